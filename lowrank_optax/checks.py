"""Checks of a caller's numbers. A traced number is not known, and passes.

``optax.inject_hyperparams`` makes numbers traced.
"""

from typing import Any, TypeGuard

import jax
import numpy as np


def as_count(name: str, number: Any, least: int = 1) -> int:
    """Returns a whole number as an int.

    Args:
        name: Name of the number.
        number: The caller's; an int, of NumPy too.
        least: Smallest number allowed.

    Raises:
        ValueError: If it is not whole, an array or a bool, or below ``least``.
    """
    if not is_whole(number) or number < least:
        hint = ""
        if isinstance(number, jax.Array):
            hint = "; name it in static_args of optax.inject_hyperparams"
        raise ValueError(f"{name} must be an int >= {least}, got {number!r}{hint}.")
    return int(number)


def check_at_least(name: str, number: Any, least: float) -> None:
    """Raises ValueError if a known number is below ``least``, or not a number."""
    if is_known(number) and not number >= least:
        raise ValueError(f"{name} must be >= {least}, got {number}.")


def check_positive(name: str, number: Any) -> None:
    """Raises ValueError if a known number is not above 0."""
    if is_known(number) and not number > 0:
        raise ValueError(f"{name} must be above 0, got {number}.")


def check_decay(name: str, number: Any) -> None:
    """Raises ValueError if a known number is not inside [0, 1)."""
    if is_known(number) and not 0 <= number < 1:
        raise ValueError(f"{name} must be inside [0, 1), got {number}.")


def check_share(name: str, number: Any) -> None:
    """Raises ValueError if a known number is not inside (0, 1)."""
    if is_known(number) and not 0 < number < 1:
        raise ValueError(f"{name} must be inside (0, 1), got {number}.")


def check_is_static(name: str, value: Any, static_args: str, why: str = "") -> None:
    """Raises TypeError if a value that a program is made from is an array.

    Args:
        name: Name of the value.
        value: The caller's.
        static_args: The ``static_args`` that ``optax.inject_hyperparams`` needs.
        why: Why it may not be one. Empty: shapes depend on it.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        why = why or f"shapes depend on {name}"
        raise TypeError(
            f"{name} must be a Python number, because {why}; got an array. With "
            "optax.inject_hyperparams write "
            f"inject_hyperparams(method, static_args={static_args})."
        )


def is_known(number: Any) -> TypeGuard[float]:
    """Returns whether a number is Python's or NumPy's, and no array."""
    return isinstance(number, (int, float, np.number))


def is_whole(number: Any) -> TypeGuard[int]:
    """Returns whether a number is an int of Python or NumPy, and no bool."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)
