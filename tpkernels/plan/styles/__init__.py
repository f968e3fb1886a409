"""The styles of a plan: what each makes of a module, its attention heads and its random numbers."""
