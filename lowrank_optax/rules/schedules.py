"""When a basis is computed anew: every k updates, or on convergence.

A rule decides from the state alone, before the gradient of the step is known, so that
whoever computes gradients in the subspace knows beforehand which leaf needs a full one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class RefreshRule(Protocol):
    """What ``scale_by_low_rank`` asks of a refresh."""

    def init(self, zeros: Callable[[Any], jax.Array]) -> Any:
        """Returns the rule's own state: a pytree of numbers per matrix, or ().

        Args:
            zeros: dtype -> zeros, one for each matrix of the stack.
        """
        ...

    def is_due(self, age: jax.Array, trend: Any) -> jax.Array:
        """Returns whether a basis of this age is due, bool (*stack,)."""
        ...

    def first_age(self, fraction: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Returns the age to start from after a leaf's first refresh.

        Args:
            fraction: Position of the leaf among the projected ones, in [0, 1).
        """
        ...

    def observe(self, age: jax.Array, trend: Any, coordinates: jax.Array) -> Any:
        """Returns the rule's state after one update.

        Args:
            age: Updates since the refresh, this one included; (*stack,); 0 where there
                is no basis yet.
            trend: State before.
            coordinates: Projected gradient; (*stack, a*c, r).
        """
        ...


@dataclasses.dataclass(frozen=True)
class Every:
    """See :func:`every`."""

    interval: jax.typing.ArrayLike
    stagger: bool

    def init(self, zeros: Callable[[Any], jax.Array]) -> tuple[()]:
        """Returns no state; see :class:`RefreshRule`."""
        del zeros
        return ()

    def is_due(self, age: jax.Array, trend: tuple[()]) -> jax.Array:
        """Returns whether ``interval`` updates have passed."""
        del trend
        return age >= self.interval

    def first_age(self, fraction: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Returns the offset of a leaf; see :class:`RefreshRule`."""
        if not self.stagger:
            return 0
        return jnp.floor(fraction * self.interval).astype(jnp.int32)

    def observe(
        self, age: jax.Array, trend: tuple[()], coordinates: jax.Array
    ) -> tuple[()]:
        """Returns no state; see :class:`RefreshRule`."""
        del age, coordinates
        return trend


def every(interval: jax.typing.ArrayLike, stagger: bool = True) -> Every:
    """Refreshes each basis every ``interval`` updates.

    A refresh that a zero or non-finite gradient spoiled is repeated at the next update;
    after the n-th failure in a row, at the next update whose number 2^(n - 1) divides,
    128 at most.

    Args:
        interval: Updates between two refreshes of a leaf; >= 1.
        stagger: Spread the leaves over the interval: all of them refresh at the first
            update, then leaf i of n comes ``floor(i / n * interval)`` updates early
            once, so that no later step pays for all. False: all on the same step, as
            GaLore does.

    Raises:
        ValueError: If ``interval`` is below 1.
    """
    if isinstance(interval, int) and interval < 1:
        raise ValueError(f"interval must be >= 1, got {interval}.")
    return Every(interval, stagger)


class Trend(NamedTuple):
    """State of :func:`on_convergence`, per matrix.

    Attributes:
        average: Smoothed norm of the projected gradient; (*stack,), float32.
        reference: Its value over the first updates after the refresh; (*stack,),
            float32.
    """

    average: jax.Array
    reference: jax.Array


@dataclasses.dataclass(frozen=True)
class OnConvergence:
    """See :func:`on_convergence`."""

    min_interval: jax.typing.ArrayLike
    max_interval: jax.typing.ArrayLike
    fraction: jax.typing.ArrayLike
    decay: jax.typing.ArrayLike
    check_interval: jax.typing.ArrayLike

    def init(self, zeros: Callable[[Any], jax.Array]) -> Trend:
        """Returns zeros; see :class:`RefreshRule`."""
        return Trend(zeros(jnp.float32), zeros(jnp.float32))

    def is_due(self, age: jax.Array, trend: Trend) -> jax.Array:
        """Returns whether the norm has fallen, within the bounds of the interval."""
        has_converged = trend.average < self.fraction * trend.reference
        is_asked = (age >= self.min_interval) & (age % self.check_interval == 0)
        return (is_asked & has_converged) | (age >= self.max_interval)

    def first_age(self, fraction: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Returns 0: the norms spread the refreshes."""
        del fraction
        return 0

    def observe(self, age: jax.Array, trend: Trend, coordinates: jax.Array) -> Trend:
        """Returns the trend with one more norm; see :class:`RefreshRule`."""
        narrow = coordinates.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(narrow * narrow, axis=(-1, -2)))
        # Subtracted here: of 0.95 in float32 it would be above 1 / 20.
        return _observed(age, trend, norm, 1 - self.decay)


# Leaves with stacks of one shape share it: what is traced and lowered for them is one.
@jax.jit
def _observed(age, trend: Trend, norm, share) -> Trend:
    # The gradient of age 1 is the one that the basis was fitted to: it lies in the
    # subspace more than any other, and does not count. From age 2 on a plain mean over
    # the first 1 / share norms, exponential from there on: it forgets what was before
    # and needs no bias correction.
    counted = age - 1
    weight = jnp.maximum(1 / jnp.maximum(counted, 1), share)
    average = jnp.where(
        jnp.isfinite(norm),
        (1 - weight) * trend.average + weight * norm,
        trend.average,
    )
    is_starting = counted * share <= 1
    reference = jnp.where(is_starting, average, trend.reference)
    return Trend(average.astype(jnp.float32), reference.astype(jnp.float32))


def on_convergence(
    min_interval: jax.typing.ArrayLike = 200,
    max_interval: jax.typing.ArrayLike = 300,
    fraction: jax.typing.ArrayLike = 0.975,
    decay: jax.typing.ArrayLike = 0.95,
    check_interval: jax.typing.ArrayLike = 25,
) -> OnConvergence:
    r"""Refreshes a basis when the gradient inside its subspace has shrunk.

    With the norm ||G_t P|| smoothed by a moving average of ``decay``, the basis is due

    .. math:: \text{avg}_t < \text{fraction} \cdot \text{avg}_{\text{refresh}}

    updates later than ``min_interval`` after its last refresh, and at ``max_interval``
    in any case. avg_refresh is the mean of 1 / (1 - decay) norms after the refresh,
    without that of the gradient that the basis was computed from, which is the largest
    by construction. Each matrix of a stack decides for itself; one update later than
    the norm that decided. They are asked at ages that ``check_interval`` divides, all
    matrices alike, and so on few steps: one matrix that is due makes the update compute
    bases for its whole stack, and full gradients where those are taken in subspaces.

    Args:
        min_interval: Least updates between two refreshes; >= 1.
        max_interval: Most updates between two refreshes; >= min_interval. Waiting
            longer for convergence cost loss (``RESULTS.md``).
        fraction: Share of the norm at the refresh under which the subspace counts as
            converged; in (0, 1). Theorem 2 has sqrt(1 - threshold).
        decay: Of the moving average; in [0, 1).
        check_interval: Updates between two questions whether a matrix has converged;
            >= 1, best a divisor of both bounds, which keeps the matrices in step.

    Raises:
        ValueError: If a value is out of its range.

    References:
        AdaRankGrad, Block 3 of Algorithm 3 and Theorem 2. The paper compares the raw
        norm of one mini-batch, whose noise crosses always or never; smoothing, both
        bounds and the interval of the questions are ours.
    """
    if isinstance(min_interval, int) and min_interval < 1:
        raise ValueError(f"min_interval must be >= 1, got {min_interval}.")
    if (
        isinstance(min_interval, int)
        and isinstance(max_interval, int)
        and max_interval < min_interval
    ):
        raise ValueError(
            "max_interval must be >= min_interval, got "
            f"{min_interval=}, {max_interval=}."
        )
    if isinstance(fraction, (int, float)) and not 0 < fraction < 1:
        raise ValueError(f"fraction must be inside (0, 1), got {fraction}.")
    if isinstance(decay, (int, float)) and not 0 <= decay < 1:
        raise ValueError(f"decay must be inside [0, 1), got {decay}.")
    if isinstance(check_interval, int) and check_interval < 1:
        raise ValueError(f"check_interval must be >= 1, got {check_interval}.")
    return OnConvergence(min_interval, max_interval, fraction, decay, check_interval)
