"""Measurements against optax.contrib.galore; each file is a command."""

import os

# Read once, when JAX loads LAPACK. OpenBLAS's own threads keep waiting for work after
# each small call, and XLA's threads lack these cores. All alternatives get the setting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
