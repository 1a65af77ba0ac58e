"""How files lay a model out: a tensor per layer, and kernels as (out, in).

Ours are (in, out), one stack per kind of kernel. A table names the tensors of a format:
path in our tree to name in the file, where {} is the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig

TreePath = tuple[str, ...]
Table = Mapping[TreePath, str]
# Names of the tensors of a leaf, one for each layer.
Names = dict[TreePath, list[str]]
Array = TypeVar("Array", bound=Any)


def names_of(config: LlamaConfig, table: Table) -> Names:
    """Returns the names of the tensors of each path of a LLaMA, a name per layer."""
    tied = config.tie_embeddings
    used = {k: v for k, v in table.items() if not (tied and k == ("head",))}
    return by_layer(used, config.num_layers)


def shapes_of(config: LlamaConfig, table: Table) -> dict[str, tuple[int, ...]]:
    """Returns the shape in the file of each tensor of a LLaMA, by name."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return stored_shapes(tree, names_of(config, table))


def by_layer(table: Table, layers: int) -> Names:
    """Returns the names of the tensors of each path, a name per layer."""
    return {
        path: [name.format(i) for i in range(layers)] if is_stacked(path) else [name]
        for path, name in table.items()
    }


def stored_shapes(tree: Any, names: Names) -> dict[str, tuple[int, ...]]:
    """Returns the shape in the file of each tensor, by name.

    Args:
        tree: Our parameters, or their shapes.
        names: Of the tensors of each path.
    """
    leaves: dict[TreePath, Any] = traverse_util.flatten_dict(tree)
    shapes = {}
    for path, of_layers in names.items():
        shape = leaves[path].shape[1:] if is_stacked(path) else leaves[path].shape
        # Like flipped, for a shape.
        shape = shape if _is_table(path) else shape[::-1]
        shapes |= dict.fromkeys(of_layers, shape)
    return shapes


def stored_tensors(params: Any, names: Names) -> dict[str, np.ndarray]:
    """Returns parameters as the tensors of a file, by name."""
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for path, of_layers in names.items():
        leaf = np.asarray(leaves[path])
        parts = leaf if is_stacked(path) else [leaf]
        for name, part in zip(of_layers, parts, strict=True):
            tensors[name] = flipped(path, part)
    return tensors


def read_leaf(
    path: TreePath,
    of_layers: list[str],
    read: Callable[[str], np.ndarray],
    dtype: Any = np.float32,
) -> jax.Array:
    """Returns a leaf of our tree from the tensors of a file; a stack is (layers, ...).

    Args:
        path: Of the leaf.
        of_layers: Names of its tensors.
        read: Name -> tensor.
        dtype: Of the leaf.
    """
    parts = [flipped(path, read(name)).astype(dtype) for name in of_layers]
    return jnp.asarray(np.stack(parts) if is_stacked(path) else parts[0])


def is_stacked(path: TreePath) -> bool:
    """Returns whether a leaf of our tree has a layer per row."""
    return path[0] == "blocks"


def flipped(path: TreePath, tensor: Array) -> Array:
    """Turns (out, in) into (in, out) or back; vectors and embeddings stay."""
    return tensor if _is_table(path) else tensor.T


def _is_table(path: TreePath) -> bool:
    return path[0] in ("embedding", "embeddings")
