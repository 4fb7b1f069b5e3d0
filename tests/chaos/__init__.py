"""Chaos: real servers and consumers, a planned series of faults, and the checker's word on what was left."""
