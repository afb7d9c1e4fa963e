"""End to end: tokens per second of a tensor-parallel model under several plans."""
