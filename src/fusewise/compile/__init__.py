"""fusewise.compile."""
