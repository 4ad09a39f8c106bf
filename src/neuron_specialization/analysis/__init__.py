"""Tools for measurements and comparisons."""
