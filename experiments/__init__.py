"""LLaMA pre-training with low-rank optimizers: one command, every part importable."""
