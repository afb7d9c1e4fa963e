"""fusewise.integrations."""
