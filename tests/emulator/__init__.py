"""The kernels on a CPU, under a random scheduler."""
