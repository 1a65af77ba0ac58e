"""The group of each parameter: block matrix, vector, head, frozen or the rest."""

from typing import Any

import jax


def parameter_groups(params: Any) -> Any:
    """Returns a tree like ``params`` of the groups' names.

    "blocks" are the matrices (L, n, m) of attention and MLP, and an encoder's pooler
    (d, d). "norms" are the vectors: of norms, and biases. "classifier" is an encoder's
    head for its labels, kernel and bias. "rest" are embeddings, and a LLaMA's head.
    With adapters, the adapters are "blocks" and the matrices are "frozen".
    """

    def group(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("adapters/"):
            return "blocks"
        names = name.removeprefix("model/").split("/")
        if names[0] == "classifier":
            return "classifier"
        if "norm" in name or names[-1] == "bias":
            return "norms"
        if names[0] not in ("blocks", "pooler"):
            return "rest"
        return "frozen" if name.startswith("model/") else "blocks"

    return jax.tree_util.tree_map_with_path(group, params)
