"""Data, training and scoring of multilingual translation."""
