"""Running the plan: the communicator and its operators."""
