"""Measurements: whole consumers side by side, ratios first."""
