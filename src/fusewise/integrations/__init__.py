"""Where the vLLM plugin was before 0.1: its name in entry points that are installed already."""
