"""What engines do by themselves, and what it costs."""
