"""Shared by methods: Adam with checked arguments, and the chain to an optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import check_at_least, check_decay, check_positive
from lowrank_optax.core import NumbersByPath
from lowrank_optax.matrix.boxes import is_box

Mask = Any | Callable[[Any], Any]


def checked_adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    raw_eps: bool = False,
) -> optax.GradientTransformation:
    """Returns ``optax.scale_by_adam``.

    Args:
        b1, b2, eps, eps_root, mu_dtype: See ``optax.scale_by_adam``.
        raw_eps: Whether to add eps to the root of the second moment before the bias
            correction. eps then counts as eps / sqrt(1 - b2^t).

    Raises:
        ValueError: If a value is out of its range. Traced values
            (``optax.inject_hyperparams``) cannot be checked.
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_positive("eps", eps)
    check_at_least("eps_root", eps_root, 0)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)
    if not raw_eps:
        return adam

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        now = eps / jnp.sqrt(1 - jnp.asarray(b2, jnp.float32) ** count)
        each = optax.scale_by_adam(b1, b2, now, eps_root, mu_dtype)
        return each.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def as_optimizer(
    transformation: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the chain of a transformation, decoupled weight decay and learning rate.

    Raises:
        ValueError: If ``weight_decay`` is negative.
    """
    check_at_least("weight_decay", weight_decay, 0)
    return optax.chain(
        transformation,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def by_kind(
    matrix: Callable[[NumbersByPath], optax.GradientTransformation],
) -> Callable[[NumbersByPath], optax.GradientTransformation]:
    """Returns a maker of ``matrix`` for (stacks of) matrices and Adam for vectors."""

    def made(numbers: NumbersByPath) -> optax.GradientTransformation:
        def labels(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "vector" if numbers[path] is None else "matrix",
                tree,
                is_leaf=is_box,
            )

        return optax.partition(
            {"matrix": matrix(numbers), "vector": optax.scale_by_adam()}, labels
        )

    return made
