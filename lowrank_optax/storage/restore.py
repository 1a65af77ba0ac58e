"""``like_saved``: the shapes in a checkpoint, for restoring it."""

from typing import Any

import jax

from lowrank_optax.binding.states import names
from lowrank_optax.matrix.arrays import leaf_name


def like_saved(state: Any, saved: Any) -> Any:
    """Returns the shapes of a state, with the capacities of a saved state.

    The shapes in a checkpoint may differ from those of a new state, and a restore needs
    the shapes in the checkpoint. With Orbax::

        checkpointer = ocp.StandardCheckpointer()
        state = jax.eval_shape(optimizer.init, params)
        saved = checkpointer.metadata(path).item_metadata.tree
        state = checkpointer.restore(path, lowrank_optax.like_saved(state, saved))

    Args:
        state: First state of the optimizer, or a tree that contains this state; shapes
            or arrays. The result keeps shardings.
        saved: Tree with the same names, and leaves with a ``shape``: Orbax's metadata,
            or another state.

    Returns:
        A tree like ``state`` of ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: If an array is missing in ``saved``. The saved state then comes from
            another optimizer, from other arguments of ``low_bit``, or from a version of
            this library before 0.2.
    """
    leaves = jax.tree.leaves_with_path(saved)
    shapes = {names(path): tuple(leaf.shape) for path, leaf in leaves}
    fields = {name for found in shapes for name in found}
    if "refreshes" in fields and "failures" not in fields:
        raise ValueError(
            "the saved state was written by lowrank_optax before 0.2, and this version "
            "cannot read that layout; finish the run with the version that began it."
        )

    def of_leaf(path, leaf):
        name = names(path)
        if name not in shapes or len(shapes[name]) != len(leaf.shape):
            raise ValueError(
                f"{leaf_name(path)} of shape {tuple(leaf.shape)} is "
                f"{shapes.get(name, 'not there')} in the saved state; was the saved "
                "state made by another optimizer, or by low_bit with other bits or "
                "basis_bits?"
            )
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(of_leaf, state)
