"""LLaMA pre-training with low-rank optimizers: its commands, every part importable.

``python -m experiments`` lists the commands. Below them, a room imports only those that
come before it: ``data``, ``model``, ``distribution``, ``tasks``, ``optim``, ``run``,
``tuning`` and ``comparison``.
"""

import os

# Read once, when JAX brings LAPACK in. On CPUs OpenBLAS's own threads go on waiting for
# work after each small call, on the cores that XLA's then lack.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
