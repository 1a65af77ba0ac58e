"""The group of each parameter: block matrix, norm, frozen or the rest."""

from typing import Any

import jax


def parameter_groups(params: Any) -> Any:
    """Returns a tree like ``params`` of "blocks", "norms", "rest" or "frozen".

    "blocks" are the stacked matrices (L, n, m) of attention and MLP. With adapters, the
    adapters are "blocks" and the matrices are "frozen".
    """

    def group(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name:
            return "norms"
        if name.startswith("adapters/"):
            return "blocks"
        is_matrix = "blocks/" in name and len(leaf.shape) == 3
        if is_matrix and name.startswith("model/"):
            return "frozen"
        return "blocks" if is_matrix else "rest"

    return jax.tree_util.tree_map_with_path(group, params)
