"""Shared by all methods: Adam with checked arguments, and the chain to an optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
    for name, value in (("b1", b1), ("b2", b2)):
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{name} must be inside [0, 1), got {value}.")
    if isinstance(eps, (int, float)) and eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}.")
    if isinstance(eps_root, (int, float)) and eps_root < 0:
        raise ValueError(f"eps_root must be >= 0, got {eps_root}.")
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
    if isinstance(weight_decay, (int, float)) and weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}.")
    return optax.chain(
        transformation,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
