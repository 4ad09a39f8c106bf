"""Metric modules that `evaluate` loads by path."""
