"""``like_saved``: the shapes that a checkpoint was written with."""

from typing import Any

import jax

from lowrank_optax.binding.states import names


def like_saved(state: Any, saved: Any) -> Any:
    """Returns the shapes of a state with the capacities of a saved one.

    A checkpoint holds the shapes that it was written with, and restoring asks for a
    tree of the shapes to expect. With Orbax::

        checkpointer = ocp.StandardCheckpointer()
        state = jax.eval_shape(optimizer.init, params)
        saved = checkpointer.metadata(path).item_metadata.tree
        state = checkpointer.restore(path, lowrank_optax.like_saved(state, saved))

    Args:
        state: Shapes, or arrays, of the optimizer's first state, or a tree that has it
            inside; shardings of shapes are kept.
        saved: Tree with the same names, whose leaves have a ``shape``: Orbax's
            metadata, or another state.

    Returns:
        A tree like ``state`` of ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: If an array is missing in ``saved``, which happens where the state
            was saved with another optimizer, other arguments of ``low_bit``, or by a
            version of this library before 0.2.
    """
    leaves = jax.tree.leaves_with_path(saved)
    shapes = {names(path): tuple(leaf.shape) for path, leaf in leaves}
    fields = {name for found in shapes for name in found}
    if "refreshes" in fields and "failures" not in fields:
        raise ValueError(
            "the saved state was written by lowrank_optax before 0.2, whose layout is "
            "another one and is not read; finish that run with the version that began "
            "it."
        )

    def of_leaf(path, leaf):
        name = names(path)
        if name not in shapes or len(shapes[name]) != len(leaf.shape):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} of shape {tuple(leaf.shape)} is "
                f"{shapes.get(name, 'not there')} in the saved state; was that made "
                "by another optimizer, or with other bits or basis_bits of low_bit?"
            )
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(of_leaf, state)
