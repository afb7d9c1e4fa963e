"""What was measured on one node, and the plan that follows from it."""
