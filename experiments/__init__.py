"""LLaMA pre-training with low-rank optimizers: one command, every part importable."""

import os

# Read once, when JAX brings LAPACK in. On CPUs OpenBLAS's own threads go on waiting for
# work after each small call, on the cores that XLA's then lack.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
