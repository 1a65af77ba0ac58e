"""Ranks and columns of an optimizer's state, by the names of the matrices."""

from typing import Any

import numpy as np

import lowrank_optax


def ranks_by_name(opt_state: Any) -> dict[str, Any]:
    """Returns the rank in use per projected leaf: an int, or a list of a stack's."""
    ranks = lowrank_optax.ranks(opt_state)
    return {
        matrix_name(path): np.asarray(rank).tolist() for path, rank in ranks.items()
    }


def capacities_line(opt_state: Any) -> str:
    """Returns the columns of each leaf in words."""
    found = lowrank_optax.capacities(opt_state)
    return ", ".join(f"{matrix_name(path)} {count}" for path, count in found.items())


def matrix_name(path: str) -> str:
    """Returns the name of a leaf, as blocks/mlp/up, from its key path."""
    return path.strip("[']").replace("']['", "/")
