"""How many columns of a basis to keep: a fixed number, or by energy."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import (
    as_count,
    check_decay,
    check_is_static,
    check_share,
    is_known,
    is_whole,
)


class RankRule(Protocol):
    """The interface of a rank rule for ``scale_by_low_rank``."""

    @property
    def capacity(self) -> int:
        """Columns that ``init`` allocates per matrix."""
        ...

    def select(
        self, energies: jax.Array, demand: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the rank to use, int32 (*stack,), and the new demand, float32.

        Args:
            energies: Share of the squared Frobenius norm in each column, largest first;
                (*stack, capacity). The capacity is that of the state's arrays.
            demand: Smoothed demand so far, in columns; (*stack,).
            count: Updates done, int32 ().
        """
        ...


@dataclasses.dataclass(frozen=True)
class FixedRank:
    """The rule for a fixed rank: every column of the capacity, always."""

    capacity: int

    def select(
        self, energies: jax.Array, demand: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the capacity; see :class:`RankRule`."""
        del count
        capacity = energies.shape[-1]
        full = jnp.full(energies.shape[:-1], capacity, jnp.int32)
        return full, jnp.full_like(demand, capacity)


@dataclasses.dataclass(frozen=True)
class EnergyRank:
    """See :func:`energy_rank`."""

    capacity: int
    threshold: jax.typing.ArrayLike
    min_rank: optax.ScalarOrSchedule
    smoothing: jax.typing.ArrayLike

    def select(
        self, energies: jax.Array, demand: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the rank in use; see :class:`RankRule`."""
        capacity = energies.shape[-1]
        now = needed_rank(energies, self.threshold).astype(demand.dtype)
        smoothed = self.smoothing * demand + (1 - self.smoothing) * now
        demand = jnp.asarray(smoothed, jnp.float32)
        floor = self.min_rank(count) if callable(self.min_rank) else self.min_rank
        low = jnp.clip(jnp.round(jnp.asarray(floor)).astype(jnp.int32), 1, capacity)
        rank = jnp.clip(jnp.ceil(demand).astype(jnp.int32), low, capacity)
        return rank, demand


def energy_rank(
    max_rank: int,
    threshold: jax.typing.ArrayLike = 0.0003,
    min_rank: optax.ScalarOrSchedule | None = None,
    smoothing: jax.typing.ArrayLike = 0.5,
) -> EnergyRank:
    r"""Rank by captured energy, smoothed over refreshes, within [min_rank, max_rank].

    e_1 >= e_2 >= ... are the captured shares of a gradient's squared Frobenius norm. A
    refresh demands the least k with

    .. math:: 1 - (e_1 + \dots + e_k) \le \eta

    or the capacity, if no k is enough. The demand is smoothed over refreshes,
    d <- s d + (1 - s) k, and the rank in use is the ceiling of d, clipped. The rank
    starts at ``max_rank``, falls and rises. A single noisy gradient does not decide the
    rank. Gradients of early pre-training, nearly of rank one, do not collapse the rank.

    Args:
        max_rank: Capacity: columns allocated per matrix; >= 1.
        threshold: Share eta of the squared norm that may be lost; in (0, 1). The
            paper's Equation 2 has squared norms, as here; its Algorithm 2 has plain
            norms.
        min_rank: Least rank in use; 1 to max_rank; None: seven eighths of max_rank. Or
            a schedule: number of updates done -> least rank, which is rounded and kept
            within the columns that there are. A refresh asks the schedule.
        smoothing: Weight s of the past, per refresh; in [0, 1). At 0 the last gradient
            alone decides, as in the paper.

    Raises:
        ValueError: If a value is out of its range.

    References:
        AdaRankGrad, Algorithm 2 (IASS). The printed binary search does not end; a
        cumulative sum gives the answer in one pass. The paper's rank is the demand of
        one gradient, without smoothing.
    """
    max_rank = as_count("max_rank", max_rank)
    if min_rank is None:
        min_rank = max(1, 7 * max_rank // 8)
    check_share("threshold", threshold)
    if is_known(min_rank):
        if not is_whole(min_rank) or not 1 <= min_rank <= max_rank:
            raise ValueError(f"min_rank must be in 1..{max_rank}, got {min_rank}.")
        min_rank = int(min_rank)
    check_decay("smoothing", smoothing)
    return EnergyRank(max_rank, threshold, min_rank, smoothing)


def needed_rank(energies: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
    """Returns the least k with 1 - (e_1 + ... + e_k) <= threshold, int32 (*stack,).

    Args:
        energies: Captured shares, largest first; (*stack, capacity).
        threshold: Share that may be lost.

    Returns:
        k, in 1..capacity; the capacity where no k reaches the threshold.
    """
    residual = 1 - jnp.cumsum(energies, axis=-1)
    # The last column always counts as reached, so that argmax finds at least this one.
    reached = (residual <= threshold).at[..., -1].set(True)
    return jnp.argmax(reached, axis=-1).astype(jnp.int32) + 1


def as_rank_rule(rank: "int | RankRule") -> RankRule:
    """Returns a rank rule from an int or a rule.

    Raises:
        ValueError: If ``rank`` is an int below 1.
        TypeError: If ``rank`` is neither an int nor a rule.
    """
    check_is_static("rank", rank, '("rank",)')
    if is_whole(rank):
        return FixedRank(as_count("rank", rank))
    if isinstance(rank, int) or not hasattr(rank, "select"):
        raise TypeError(f"rank must be an int or a rank rule, got {rank!r}.")
    return rank
