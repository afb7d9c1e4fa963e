"""fusewise.report."""
