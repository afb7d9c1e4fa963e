"""The CUDA sources, their build and their launch."""
