"""Low-rank gradient transformations for Optax."""
