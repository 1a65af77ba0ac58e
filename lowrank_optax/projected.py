"""``Projected``: a gradient inside its leaf's subspace, told apart by its type."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lowrank_optax.matrix.boxes import unboxed
from lowrank_optax.matrix.sharding import abstract

# What functions that make masks and labels make of an array.
_LABELS = (bool, np.bool_, str, optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class _InPlace:
    """Key of what is inside: it prints as nothing, the leaf's path as its own."""

    key: str = ""

    def __str__(self) -> str:
        return self.key


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Projected:
    """A projected gradient R = G P, where a tree of gradients else has the full one.

    ``update`` of every low-rank transformation takes it, and ``accumulate``. What works
    leaf by leaf on gradients alone needs to know nothing of it: norms, clipping, a
    schedule's factor. What needs the parameter beside the gradient, or an array of its
    size (``optax.MultiSteps``, coupled weight decay, momentum), raises an error that
    names this type, for that belongs behind the low-rank transformation.

    A node of one array. Where a function of a tree makes a bool or a string of that
    array, as those do that make masks and labels for ``optax.masked`` and
    ``optax.partition``, the node goes with it, and what it made stands in its place.

    Attributes:
        coordinates: R; (*stack, a*c, r), float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> gradients = {"w": Projected(jnp.ones((64, 4))), "b": jnp.ones(16)}
        >>> round(float(optax.tree.norm(gradients)) ** 2)
        272
        >>> jax.tree.map(lambda leaf: leaf.ndim > 1, gradients)
        {'b': False, 'w': True}
    """

    coordinates: Any

    def tree_flatten_with_keys(self):
        """Returns the array, with a key that prints as nothing."""
        return ((_InPlace(), self.coordinates),), None

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        """Returns the record again, or what has become a label or a mask."""
        del aux_data
        (child,) = children
        return child if isinstance(child, _LABELS) else cls(child)


class ProjectedSum(NamedTuple):
    """Projected gradients added up: what a state has in the place of the full sum.

    Attributes:
        coordinates: (*stack, a*c, r), float32 or wider.
    """

    coordinates: Any


def is_projected(node: Any) -> bool:
    """Returns whether a node of a tree of gradients is a projected one."""
    return isinstance(node, Projected)


def gradients_by_path(gradients: Any) -> dict[tuple, Any]:
    """Returns each gradient, an array or :class:`Projected`, by its leaf's key path."""
    leaves = jax.tree.leaves_with_path(unboxed(gradients), is_leaf=is_projected)
    return dict(leaves)


def full_size(gradients: Any, params: Any) -> Any:
    """Returns a tree like the gradients with the shapes that they have at full size.

    Args:
        gradients: Arrays, or :class:`Projected` in the place of some.
        params: Parameters; None, if no gradient is projected.

    Raises:
        ValueError: If a gradient is projected and there are no parameters.
    """
    if params is None:
        for path, gradient in gradients_by_path(gradients).items():
            if is_projected(gradient):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is projected, which does not say "
                    "what shape it had: give update params too, "
                    "optimizer.update(gradients, state, params)."
                )
        return gradients

    def at_full_size(gradient, param):
        if not is_projected(gradient):
            return gradient
        return abstract(param)

    return jax.tree.map(at_full_size, gradients, params, is_leaf=is_projected)
