"""Measurements against optax.contrib.galore; each file is a command."""
