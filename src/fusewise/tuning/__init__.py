"""fusewise.tuning."""
