"""A parameter leaf seen as a stack of oriented matrices."""
