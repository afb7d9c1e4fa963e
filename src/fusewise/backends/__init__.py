"""fusewise.backends."""
