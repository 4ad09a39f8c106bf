"""Export: models that need none of this package's code."""
