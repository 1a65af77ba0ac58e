"""How files lay a LLaMA out: a tensor per layer, and kernels as (out, in).

Ours are (in, out), one stack per kind of kernel. A table names the tensors of a format:
path in our tree to name in the file, where {} is the layer.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import traverse_util

from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig

TreePath = tuple[str, ...]
Table = Mapping[TreePath, str]
Array = TypeVar("Array", bound=Any)


def names_of(config: LlamaConfig, table: Table) -> dict[TreePath, list[str]]:
    """Returns the names of the tensors of each path of our tree, a name per layer."""
    return {
        path: [name.format(i) for i in range(config.num_layers)]
        if is_stacked(path)
        else [name]
        for path, name in table.items()
        if not (config.tie_embeddings and path == ("head",))
    }


def shapes_of(config: LlamaConfig, table: Table) -> dict[str, tuple[int, ...]]:
    """Returns the shape in the file of each tensor, by name."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves: dict[TreePath, Any] = traverse_util.flatten_dict(tree)
    shapes = {}
    for path, names in names_of(config, table).items():
        shape = leaves[path].shape[1:] if is_stacked(path) else leaves[path].shape
        # Like flipped, for a shape.
        shapes |= dict.fromkeys(names, shape if path == ("embedding",) else shape[::-1])
    return shapes


def is_stacked(path: TreePath) -> bool:
    """Returns whether a leaf of our tree has a layer per row."""
    return path[0] == "blocks"


def flipped(path: TreePath, tensor: Array) -> Array:
    """Turns (out, in) into (in, out) or back; vectors and embeddings stay."""
    return tensor if path[0] in ("embedding", "embeddings") else tensor.T
