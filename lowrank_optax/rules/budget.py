"""A budget of bytes in place of a rank."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from lowrank_optax.rules.ranks import FixedRank

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclasses.dataclass(frozen=True)
class Budget:
    """See :func:`budget`.

    Attributes:
        limit: Largest size of the state, in bytes.
    """

    limit: int

    @property
    def capacity(self) -> int:
        """Raises ValueError: only parameters turn a budget into a rank."""
        raise ValueError(
            "a budget has a rank only beside parameters, that is inside init."
        )

    def select(
        self, energies: jax.Array, demand: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the capacity; see :class:`lowrank_optax.rules.ranks.RankRule`."""
        return FixedRank(energies.shape[-1]).select(energies, demand, count)


def budget(limit: int | str) -> Budget:
    """A limit in bytes on the state of a low-rank transformation, for ``rank=``.

    ``init`` gives every matrix the same rank: the largest rank whose state fits. The
    state is that of the whole transformation: bases, moments, counters and leaves at
    full size, all in the storage of an outer ``low_bit``. The sums of an outer
    :func:`lowrank_optax.accumulate` come on top. A leaf whose short side is
    not above the rank stays at full size. This may take fewer bytes, so that a rank may
    fit although a smaller rank does not. At least one leaf is projected. After some
    gradients, :func:`lowrank_optax.reallocate` spreads the same bytes over the leaves
    for the most captured energy.

    Args:
        limit: Bytes: an int, or a number with a unit: "600MB" (10^6), "1.5 GiB" (2^30).

    Raises:
        ValueError: If ``limit`` cannot be read; in ``init``, if the state fits with no
            rank. The message names the least number of bytes.

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
        ValueError: If the text cannot be read or the number is below 1.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(text).lower())
    try:
        value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        value = 0
    if value < 1:
        raise ValueError(
            f"{text!r} is not a number of bytes; write 600MB or 1.5GiB, for instance. "
            f"Units are {', '.join(unit for unit in _UNITS if unit)}."
        )
    return value


class Size(NamedTuple):
    """The size of a state at one rank.

    Attributes:
        bytes: Bytes of all arrays of the state.
        layout: Structure of the state, without the rank; hashable. Ranks with one
            layout are contiguous, and their bytes never fall with the rank.
    """

    bytes: int
    layout: Hashable


def largest_fitting(
    size_at: Callable[[int], Size], limit: int, lasts: Sequence[int]
) -> int:
    """Returns the largest rank whose state takes at most ``limit`` bytes.

    Bytes fall only where the layout changes: a leaf goes to full size, or an array
    becomes large enough for fewer bits. Between two such ranks the search bisects.

    Args:
        size_at: Rank -> size.
        limit: Bytes.
        lasts: Rising ranks, >= 1, after each of which the layout is known to change.
            The last of them is the largest rank to consider.

    Raises:
        ValueError: If no rank fits. The message names the least number of bytes.
    """
    sizes: dict[int, Size] = {}

    def at(rank: int) -> Size:
        if rank not in sizes:
            sizes[rank] = size_at(rank)
        return sizes[rank]

    def largest(low: int, high: int) -> int | None:
        """Returns the largest rank of low..high that fits."""
        if at(high).bytes <= limit:
            return high
        middle = (low + high) // 2
        if at(low).layout != at(high).layout:
            return largest(middle + 1, high) or largest(low, middle)
        if at(low).bytes > limit:
            return None
        # low fits, and high does not.
        while high - low > 1:
            if at(middle).bytes <= limit:
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        return low

    firsts = [1, *(rank + 1 for rank in lasts[:-1])]
    for low, high in zip(reversed(firsts), reversed(lasts), strict=True):
        if found := largest(low, high):
            return found
    least = min(sizes, key=lambda rank: sizes[rank].bytes)
    raise ValueError(
        f"a budget of {limit:,} bytes is too small: the least state takes "
        f"{sizes[least].bytes:,} bytes at rank {least}. Give so many bytes, project "
        "more leaves, or store arrays in fewer bits with low_bit."
    )


# (shapes of a state, params) -> shapes of the state in its storage format
Storage = Callable[[Any, Any], Any]
_storage: contextvars.ContextVar[Storage | None] = contextvars.ContextVar(
    "lowrank_optax_storage", default=None
)


@contextlib.contextmanager
def stored_as(storage: Storage) -> Iterator[None]:
    """Makes each ``init`` inside the context count the bytes of a storage format.

    Args:
        storage: (shapes of a state, params) -> shapes of the state as it is stored.
    """
    token = _storage.set(storage)
    try:
        yield
    finally:
        _storage.reset(token)


def storage() -> Storage | None:
    """Returns the storage format of the context; see :func:`stored_as`."""
    return _storage.get()


def as_stored(state: Any, params: Any) -> Any:
    """Returns the shapes of a state in its storage format; see :func:`stored_as`."""
    format_of = _storage.get()
    return state if format_of is None else format_of(state, params)
