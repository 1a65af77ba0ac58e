"""Optax's Adam with its arguments checked."""

import jax
import optax


def checked_adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """Returns ``optax.scale_by_adam``.

    Raises:
        ValueError: If a value is out of its range. Traced values
            (``optax.inject_hyperparams``) cannot be checked.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{name} must be inside [0, 1), got {value}.")
    if isinstance(eps, (int, float)) and eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}.")
    return optax.scale_by_adam(b1, b2, eps)
