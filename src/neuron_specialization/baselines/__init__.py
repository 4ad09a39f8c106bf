"""What the paper compares with, and the comparison itself."""
