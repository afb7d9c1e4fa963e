"""fusewise.kernels."""
