"""Measurements against optax.contrib.galore; each file is a command."""

import os

# Read once, when JAX brings LAPACK in. OpenBLAS's own threads go on waiting for work
# after each small call, on the cores that XLA's then lack; all alternatives get this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
