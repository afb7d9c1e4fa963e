"""fusewise.decode."""
