"""Our own fused kernels."""
