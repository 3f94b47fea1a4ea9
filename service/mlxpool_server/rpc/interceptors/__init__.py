"""What happens around every call of our own services."""
