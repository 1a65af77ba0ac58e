"""When a basis is renewed: every k updates, or on convergence.

A rule decides from the state alone, before the gradient of the step is known. The code
that computes subspace gradients therefore knows beforehand which leaves need full
gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lowrank_optax.checks import check_at_least, check_decay, check_share, is_known


class RefreshRule(Protocol):
    """The interface of a refresh rule for ``scale_by_low_rank``."""

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
        """Returns the starting age after a leaf's first refresh.

        Args:
            fraction: Position of the leaf among the projected ones, in [0, 1).
        """
        ...

    def observe(self, age: jax.Array, trend: Any, coordinates: jax.Array) -> Any:
        """Returns the rule's state after one update.

        Args:
            age: Updates since the refresh, with this update; (*stack,); 0 for a matrix
                without a basis.
            trend: State before the update.
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

    A zero or non-finite gradient spoils a refresh, and the refresh is tried again at
    the next update. After the n-th failure in a row, the next try is at an update whose
    number is a multiple of 2^(n - 1), at most 128.

    Args:
        interval: Updates between two refreshes of a leaf; >= 1.
        stagger: Whether to spread the leaves over the interval. All leaves refresh at
            the first update. The second refresh of leaf i of n comes
            ``floor(i / n * interval)`` updates early, so that no later step pays for
            all leaves. False: all leaves refresh on the same step, as in GaLore.

    Raises:
        ValueError: If ``interval`` is below 1.
    """
    check_at_least("interval", interval, 1)
    return Every(interval, stagger)


class Trend(NamedTuple):
    """State of :func:`on_convergence`, per matrix.

    Attributes:
        average: Smoothed norm of the projected gradient; (*stack,), float32.
        reference: Mean of this norm over the first updates after the refresh;
            (*stack,), float32.
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
        # Subtracted here, where 0.95 has full precision: float32 would give > 1 / 20.
        return _observed(age, trend, norm, 1 - self.decay)


# Jitted, so that leaves with stacks of one shape share one trace and one lowering.
@jax.jit
def _observed(age, trend: Trend, norm, share) -> Trend:
    # The basis was fitted to the gradient of age 1, which lies in the subspace more
    # than any other gradient, and does not count. From age 2 on the average is a plain
    # mean of the first 1 / share norms, then exponential. The average forgets the time
    # before the refresh and needs no bias correction.
    counted = (age - 1).astype(jnp.float32)
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

    avg_t is a moving average of the norm ||G_t P||, with the decay ``decay``. A basis
    counts as converged when

    .. math:: \text{avg}_t < \text{fraction} \cdot \text{avg}_{\text{refresh}}

    A converged basis is due from ``min_interval`` updates after its last refresh on;
    every basis is due after ``max_interval`` updates. avg_refresh is the mean of
    1 / (1 - decay) norms after the refresh. The gradient that the basis was computed
    from is left out, because its norm is the largest by construction.

    Each matrix of a stack is tested by itself, every ``check_interval`` updates. The
    refresh comes one update after the test. Tests at common ages keep refreshes on few
    steps. This saves time: one due matrix makes the update compute bases for its whole
    stack, and needs full gradients where gradients are otherwise projected.

    Args:
        min_interval: Least updates between two refreshes; >= 1.
        max_interval: Most updates between two refreshes; >= min_interval. Waiting
            longer for convergence cost loss (``docs/results.md``).
        fraction: Share of the norm at the refresh. Below it the basis counts as
            converged; in (0, 1). Theorem 2 has sqrt(1 - threshold).
        decay: Decay of the moving average; in [0, 1).
        check_interval: Updates between two tests of a matrix; >= 1. A divisor of both
            bounds keeps the matrices in step.

    Raises:
        ValueError: If a value is out of its range.

    References:
        AdaRankGrad, Block 3 of Algorithm 3 and Theorem 2. The paper compares the raw
        norm of one mini-batch, and the noise of this norm crosses the threshold always
        or never. The smoothing, both bounds and the interval of the tests are ours.
    """
    check_at_least("min_interval", min_interval, 1)
    if (
        is_known(min_interval)
        and is_known(max_interval)
        and not max_interval >= min_interval
    ):
        raise ValueError(
            "max_interval must be >= min_interval, got "
            f"{min_interval=}, {max_interval=}."
        )
    check_share("fraction", fraction)
    check_decay("decay", decay)
    check_at_least("check_interval", check_interval, 1)
    return OnConvergence(min_interval, max_interval, fraction, decay, check_interval)
