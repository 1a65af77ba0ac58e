"""Ranks and columns of an optimizer's state, by the names of the matrices."""

from typing import Any

import numpy as np

import lowrank_optax
from experiments.model.layers import by_kind


def ranks_by_name(opt_state: Any) -> dict[str, Any]:
    """Returns the rank in use per kind of matrix: an int, or a list of its layers'."""
    ranks = lowrank_optax.ranks(opt_state)
    return by_kind(
        {matrix_name(k): np.asarray(rank).tolist() for k, rank in ranks.items()}
    )


def capacities_line(opt_state: Any) -> str:
    """Returns the columns of each kind of matrix in words: one number, or a range."""
    found = lowrank_optax.capacities(opt_state)
    kinds = by_kind({matrix_name(path): count for path, count in found.items()})
    return ", ".join(f"{name} {_range(counts)}" for name, counts in kinds.items())


def _range(counts: Any) -> str:
    least, most = np.min(counts), np.max(counts)
    return f"{least}" if least == most else f"{least} to {most}"


def matrix_name(path: str) -> str:
    """Returns the name of a leaf, as blocks/mlp/up, from its key path."""
    return path.strip("[']").replace("']['", "/")
