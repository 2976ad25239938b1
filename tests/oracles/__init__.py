"""Independent implementations to hold the package against."""
