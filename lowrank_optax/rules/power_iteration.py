"""A basis that follows the last basis by one power iteration an update."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_optax.checks import check_decay
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.orthonormal import orthonormalize
from lowrank_optax.rules.products import (
    NEARLY,
    image_rows,
    is_usable,
    scaled,
    sketch_rows,
)


@dataclasses.dataclass(frozen=True)
class PowerIteration:
    """See :func:`power_iteration`."""

    rho: jax.typing.ArrayLike
    b1: jax.typing.ArrayLike
    start: BasisRule

    def blended(
        self, gradient: jax.Array, momentum: jax.Array, count: jax.Array
    ) -> jax.Array:
        """Returns A: the gradient blended with the bias-corrected momentum.

        Args:
            gradient: G.
            momentum: M P^T, like G.
            count: Updates done.
        """
        b1, t = (jnp.asarray(x, gradient.dtype) for x in (self.b1, count))
        correction = 1 - b1 ** jnp.maximum(t, 1)
        blend = self.rho * momentum / correction + (1 - self.rho) * gradient
        return jnp.asarray(blend)

    def compute(
        self,
        matrix: jax.Array,
        previous: jax.Array,
        seeds: jax.Array,
    ) -> jax.Array:
        """Returns the basis; see :class:`BasisRule`."""
        is_first = ~jnp.any(previous != 0, axis=(-1, -2), keepdims=True)
        image = image_rows(matrix, jnp.swapaxes(previous, -1, -2))
        product = sketch_rows(matrix, orthonormalize(scaled(image), NEARLY))
        columns = jnp.swapaxes(orthonormalize(scaled(product)), -1, -2)
        columns = jnp.where(is_usable(product), columns, 0)

        def started():
            start = self.start.compute(matrix, previous, seeds)
            return jnp.where(is_first, start.astype(columns.dtype), columns)

        return jax.lax.cond(jnp.any(is_first), started, lambda: columns)


def power_iteration(
    rho: jax.typing.ArrayLike = 0.0,
    b1: jax.typing.ArrayLike = 0.9,
    start: BasisRule | None = None,
) -> PowerIteration:
    r"""Basis that follows the last basis by one power iteration, as in LDAdam.

    .. math::
        P = \mathrm{orth}(A^\top A P_{old}), \quad
        A = \rho \frac{M P_{old}^\top}{1 - b_1^t} + (1 - \rho) G

    orth is Gram-Schmidt: columns keep their positions and are not ordered by energy.
    Cost: two products with A, and a lift of the momentum, if there is a first moment.

    Args:
        rho: Weight of the momentum M, the first moment of the inner transformation; in
            [0, 1).
        b1: Decay of the first moment, for its bias correction; in [0, 1).
        start: Rule of the first basis; None: ``range_finder(power_iterations=2)``.

    Raises:
        ValueError: If ``rho`` or ``b1`` is out of its range.

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
    """
    check_decay("rho", rho)
    check_decay("b1", b1)
    start = range_finder(power_iterations=2) if start is None else start
    return PowerIteration(rho, b1, start)
