"""Talking to a model, or in its place, in the terminal: see `__main__`."""
