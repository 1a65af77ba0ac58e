"""``Projected`` and ``Sketch``: what may stand in the place of a full gradient."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.boxes import unboxed
from lowrank_optax.matrix.sharding import abstract

# Results of functions that make masks and labels from arrays.
_LABELS = (bool, np.bool_, str, optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class _InPlace:
    """Key of the array inside. It prints as nothing, so paths end at the leaf."""

    key: str = ""

    def __str__(self) -> str:
        return self.key


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Projected:
    """A projected gradient R = G P, in place of the full gradient in a tree.

    ``accumulate`` and the ``update`` of every low-rank transformation take it.
    Linear functions of each leaf keep their meaning: a schedule's factor, sums. A norm,
    and clipping by it, is that of what is projected. Functions of entries and of axes
    work on coordinates, which changes them without a word: ``optax.clip``, noise,
    ``optax.centralize``. Give these full gradients.
    Transformations with a parameter or buffer of full size beside the gradient raise an
    error that names this type: ``optax.MultiSteps``, coupled weight decay, momentum.
    Put such transformations behind the low-rank transformation.

    The record is a pytree node with one array. A function that makes masks or labels,
    for ``optax.masked`` or ``optax.partition``, maps this array to a bool or a string.
    The result then replaces the whole node.

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
        """Returns the record again, or the label or mask in its place."""
        del aux_data
        (child,) = children
        return child if isinstance(child, _LABELS) else cls(child)


class Sketch(NamedTuple):
    """A sketch of a gradient, in the gradient's place for the renewal of a basis.

    With the gradient A (a*c, b/c) and a random test matrix Omega (a*c, k), whose
    entries have mean 0 and variance 1 / k, a sketch is Y = Omega^T A. The Gram matrix
    Y^T Y estimates A^T A without bias, so that Y has nearly the same leading right
    singular vectors, energies and norm as A. A sketch is linear in the gradient:
    sketches of several micro-batches with one test matrix are added up.

    Attributes:
        rows: Y; (*stack, k, b/c), float32 or wider.
    """

    rows: Any


class ProjectedSum(NamedTuple):
    """A sum of projected gradients in a state, in place of the full sum.

    Attributes:
        coordinates: The sum; (*stack, a*c, r), float32 or wider.
    """

    coordinates: Any


def is_projected(node: Any) -> bool:
    """Returns whether a node of a tree of gradients is a projected gradient."""
    return isinstance(node, Projected)


def gradients_by_path(gradients: Any) -> dict[tuple, Any]:
    """Returns each gradient by its leaf's key path.

    Args:
        gradients: Arrays, with :class:`Projected` or :class:`Sketch` in place of some.
    """

    def stands_in(node):
        return isinstance(node, (Projected, Sketch))

    return dict(jax.tree.leaves_with_path(unboxed(gradients), is_leaf=stands_in))


def full_size(gradients: Any, params: Any) -> Any:
    """Returns a tree like the gradients, with full shapes.

    Args:
        gradients: Arrays, with :class:`Projected` in place of some.
        params: Parameters; None, if no gradient is projected.

    Raises:
        ValueError: If a gradient is projected and ``params`` is None.
    """
    if params is None:
        for path, gradient in gradients_by_path(gradients).items():
            if is_projected(gradient):
                raise ValueError(
                    f"{leaf_name(path)}: a projected gradient lacks the "
                    "full shape, so update needs params too; call "
                    "optimizer.update(gradients, state, params)."
                )
        return gradients

    def at_full_size(gradient, param):
        if not is_projected(gradient):
            return gradient
        return abstract(param)

    return jax.tree.map(at_full_size, gradients, params, is_leaf=is_projected)


@contextlib.contextmanager
def explained(gradients: Any, who: str, ways: str) -> Iterator[None]:
    """Explains an error of an optimizer that does not take projected gradients.

    Args:
        gradients: What the optimizer is given inside the context.
        who: Who gives it.
        ways: What the user can do.

    Raises:
        TypeError: In the place of JAX's error about structures.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # jax 0.10.0 says "node type mismatch"; a cond names its branches.
        words = ("pytree", "node type mismatch", "branch outputs")
        is_of_structure = any(word in str(error) for word in words)
        has_projected = any(map(is_projected, gradients_by_path(gradients).values()))
        if not (is_of_structure and has_projected):
            raise
        raise TypeError(
            f"{who} gives the optimizer projected gradients (lowrank_optax.Projected), "
            f"and a transformation inside the optimizer does not take them. {ways}"
        ) from error
