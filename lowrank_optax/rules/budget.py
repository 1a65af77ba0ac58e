"""A budget of bytes in the place of a rank."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lowrank_optax.rules.ranks import FixedRank

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclasses.dataclass(frozen=True)
class Budget:
    """See :func:`budget`.

    Attributes:
        limit: Bytes of the state, at most.
    """

    limit: int

    @property
    def capacity(self) -> int:
        """Raises: it is not known before the parameters are; see :func:`budget`."""
        raise ValueError(
            "a budget says what a rank is only beside parameters: inside init."
        )

    def select(
        self, energies: jax.Array, demand: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the capacity; see :class:`lowrank_optax.rules.ranks.RankRule`."""
        return FixedRank(energies.shape[-1]).select(energies, demand)


def budget(limit: int | str) -> Budget:
    """Bytes that the state of a low-rank transformation may take, for ``rank=``.

    ``init`` gives every matrix the same rank, the largest with which the state of the
    whole transformation (bases, moments, counters, leaves at full size; as
    ``low_bit`` around it stores them) fits. Once gradients have been seen,
    :func:`lowrank_optax.reallocate` spreads the same bytes over the leaves so that they
    capture the most energy.

    Args:
        limit: Bytes: an int, or a number with a unit: "600MB" (10^6), "1.5 GiB" (2^30).

    Raises:
        ValueError: If it cannot be read; in ``init``, if the state does not fit with
            rank 1: the message says what would.

    Example:
        >>> import jax.numpy as jnp, lowrank_optax
        >>> state = lowrank_optax.galore(1e-2, rank=budget("10kB")).init(
        ...     {"w": jnp.ones((64, 32))}
        ... )
        >>> lowrank_optax.capacities(state)
        {"['w']": 15}
    """
    return Budget(parse_bytes(limit))


def parse_bytes(text: int | str) -> int:
    """Returns a number of bytes from "600MB", "1.5 GiB" or an int.

    Args:
        text: An int, or a number with a unit: kB, MB, GB (10^3, ...), KiB, MiB, GiB
            (2^10, ...), in any case.

    Raises:
        ValueError: If it cannot be read or is below 1.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(text).lower())
    try:
        value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        value = 0
    if value < 1:
        raise ValueError(
            f"{text!r} is not a number of bytes; write it like 600MB or 1.5GiB, with "
            f"one of {', '.join(unit for unit in _UNITS if unit)}."
        )
    return value


def largest_fitting(bytes_at: Callable[[int], int], limit: int, most: int) -> int:
    """Returns a rank in 1..most whose state takes at most ``limit`` bytes, the largest.

    Args:
        bytes_at: Rank -> bytes, rising with the rank.
        limit: Bytes.
        most: Largest rank to consider, >= 1.

    Raises:
        ValueError: If rank 1 does not fit; the message says what would.
    """
    least = bytes_at(1)
    if least > limit:
        raise ValueError(
            f"a budget of {limit:,} bytes is below the least that this state can take, "
            f"{least:,} bytes at rank 1; give at least that, project more leaves, or "
            "store them in fewer bits with low_bit."
        )
    fits, too_large = 1, most + 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if bytes_at(middle) <= limit:
            fits = middle
        else:
            too_large = middle
    return fits


# (state, params) -> the state as it is going to be stored
Storage = Callable[[Any, Any], Any]
_storage: contextvars.ContextVar[Storage | None] = contextvars.ContextVar(
    "lowrank_optax_storage", default=None
)


@contextlib.contextmanager
def stored_as(storage: Storage) -> Iterator[None]:
    """Has each ``init`` inside the context count bytes of what ``storage`` returns."""
    token = _storage.set(storage)
    try:
        yield
    finally:
        _storage.reset(token)


def as_stored(state: Any, params: Any) -> Any:
    """Returns the state as it is going to be stored; see :func:`stored_as`."""
    storage = _storage.get()
    return state if storage is None else storage(state, params)
