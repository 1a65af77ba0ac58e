"""Spectra of gradients: how many directions hold how much of them.

Figure 2 of AdaRankGrad shows the spectrum of the first gradient of a fine-tuning run.
It is that of the first batch at the parameters that the run began with.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.model.groups import parameter_groups
from experiments.run.columns import matrix_name

# Multiplications of all decompositions, n m min(n, m) for each n x m: some 20 seconds
# on a core. The matrices of a BERT or RoBERTa of 768 have 6e10, those of a 7B 2e13.
MOST_WORK = 1e11

# Name of a leaf -> singular values, largest first, (matrices, min(n, m)) float32.
Spectra = dict[str, np.ndarray]


def first_spectra(
    grads: Any, most_work: float = MOST_WORK
) -> tuple[Spectra, str | None]:
    """Returns the singular values of the gradients of all block matrices.

    Args:
        grads: Tree like the parameters; a block matrix is (*stack, n, m).
        most_work: Leaves that would take more than what is left of it are left out.

    Returns:
        The spectra by the names that ranks have, and a line on what was left out, if
        anything was. A gradient that is not finite has a spectrum of zeros.
    """
    spectra, skipped = {}, []
    groups = jax.tree.leaves(parameter_groups(grads))
    for (path, leaf), group in zip(
        jax.tree.leaves_with_path(grads), groups, strict=True
    ):
        if group != "blocks":
            continue
        name = matrix_name(jax.tree_util.keystr(path))
        work = math.prod(leaf.shape) * min(leaf.shape[-2:])
        if work > most_work:
            skipped.append(name)
            continue
        most_work -= work
        matrices = np.asarray(leaf, np.float32).reshape(-1, *leaf.shape[-2:])
        spectra[name] = np.stack([_singular_values(matrix) for matrix in matrices])
    if not skipped:
        return spectra, None
    return spectra, (
        f"the spectrum of the first gradient leaves out {', '.join(skipped)}: their "
        "decompositions would take too long"
    )


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(matrix)):
        return np.zeros(min(matrix.shape), np.float32)
    return np.linalg.svd(matrix, compute_uv=False)


def captured(spectrum: np.ndarray) -> np.ndarray:
    """Returns the share of the squared norm in the first k directions, k from 1 on.

    Args:
        spectrum: Singular values, (matrices, K).

    Returns:
        float64 (matrices, K), rising to 1; zeros for a gradient that is zero.
    """
    energies = np.cumsum(np.asarray(spectrum, np.float64) ** 2, axis=-1)
    total = energies[:, -1:]
    return np.divide(energies, total, out=np.zeros_like(energies), where=total > 0)


def needed_ranks(spectrum: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the least k that loses at most this share of the squared norm.

    Args:
        spectrum: Singular values, (matrices, K).
        threshold: Share that may be lost, as --threshold; in (0, 1).

    Returns:
        int (matrices,), in 1..K; 1 for a gradient that is zero.
    """
    enough = 1 - captured(spectrum) <= threshold
    return np.argmax(enough, axis=-1) + 1


def save_spectra(path: Path, spectra: Mapping[str, np.ndarray]) -> None:
    """Writes spectra to an .npz file, whose entries have the names of the leaves."""
    with path.open("wb") as file:
        np.savez(file, **spectra)  # pyright: ignore[reportArgumentType]


def load_spectra(path: Path) -> Spectra:
    """Returns the spectra of a file of :func:`save_spectra`."""
    with np.load(path) as file:
        return dict(file)
