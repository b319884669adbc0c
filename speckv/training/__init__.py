"""Training of the γ controller."""
