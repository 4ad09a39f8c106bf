"""What specialized neurons are: FFN blocks, activation counts, selectors and masks."""
