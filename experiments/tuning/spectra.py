"""The spectra of a fine-tuning run's first gradient, kept in its directory."""

from pathlib import Path
from typing import Any

import jax

from experiments.distribution.placement import shard_batch
from experiments.model.layers import together
from experiments.optim.methods import OPTIMIZERS
from experiments.run.parts import Parts
from experiments.run.spectra import Spectra, first_spectra, load_spectra, save_spectra

SPECTRA_FILE = "first_spectra.npz"


def write_spectra(parts: Parts[Any]) -> str | None:
    """Writes the singular values of the gradient of the first batch.

    They are those of the pre-trained weights, whenever this is called. Methods without
    a rank, and adapters, have no such file.

    Args:
        parts: Of the run.

    Returns:
        A line on what was left out, if anything was.
    """
    method = OPTIMIZERS[parts.config.optimizer]
    if "rank" not in method.own or method.adapters:
        return None
    batches = parts.work.train_iterator()
    try:
        batch = next(batches)
    finally:
        batches.close()

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda params: parts.work.loss(params, batch)[0])(params)

    grads = gradient(parts.initial_params(), shard_batch(batch, parts.mesh))
    spectra, line = first_spectra(together(grads))
    save_spectra(parts.directory / SPECTRA_FILE, spectra)
    return line


def read_spectra(directory: Path) -> Spectra | None:
    """Returns the spectra of a run; None: it has none."""
    path = directory / SPECTRA_FILE
    return load_spectra(path) if path.exists() else None
