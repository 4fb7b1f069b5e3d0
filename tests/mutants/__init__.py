"""Weakened forms of the product itself: each has one sentence less, and a check that must notice."""
