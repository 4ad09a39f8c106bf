"""What people look at: measurements and comparisons."""
