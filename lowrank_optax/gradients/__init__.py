"""Gradients inside the subspaces: products whose reverse rules are others."""
