"""Where the vLLM plugin was until 0.2: its name in entry points that are installed already."""
