"""What leaves the package: models without any of its code in them."""
