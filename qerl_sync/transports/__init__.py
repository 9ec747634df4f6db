"""How chunks reach the workers."""
