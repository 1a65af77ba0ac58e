"""The residual, or the gradient, scaled as the optimizer scales what is inside."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import check_at_least
from lowrank_optax.matrix.sharding import stack_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.residual import OfFullGradients, Pieces

# b1 and b2 of Adam.
Decays = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class _Limited(OfFullGradients):
    """Scales a part of the gradient by phi, and limits how fast its norm grows.

    Attributes:
        growth: Largest factor between the norms at two successive updates; >= 1.
        decays: b1 and b2 of Adam, if the limiter does not see its bias corrections.
    """

    growth: jax.typing.ArrayLike
    decays: Decays | None = None

    def init(self, view: MatrixView, leaf: Any) -> jax.Array:
        """Returns the last norm of the scaled part, 0 at first; (*stack,)."""
        return zeros_beside(leaf, view.stack, jnp.float32, stack_axes(view))

    def limited(
        self,
        part: jax.Array,
        axes: int | tuple[int, int],
        pieces: Pieces,
        state: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns limited(phi part), like the leaf, and its norm; (*stack,).

        Args:
            part: Like the leaf.
            axes: Of R and N, over which the norms in phi = ||N|| / ||R|| are taken.
            pieces: Of this update.
            state: Norm at the last update.
        """
        view, dtype = pieces.view, pieces.basis.dtype
        n, r = (
            jnp.linalg.norm(x.astype(dtype), axis=axes, keepdims=True)
            for x in (pieces.narrow, pieces.coordinates)
        )
        # A row that is zero inside the subspace gives no scale for its residual.
        phi = jnp.where(r > 0, n / jnp.where(r > 0, r, 1), 0)
        part = view.oriented(part) * phi
        norm = jnp.linalg.norm(part, axis=(-1, -2)).astype(jnp.float32)
        norm = norm / self._correction(pieces.count)
        most = jnp.where(state > 0, self.growth * state, norm)
        limited = jnp.minimum(norm, most)
        shrink = limited / jnp.where(norm > 0, norm, 1)
        part = part * shrink[..., None, None].astype(dtype)
        return view.unoriented(part), limited

    def _correction(self, count: jax.Array) -> jax.typing.ArrayLike:
        """Returns the factor of Adam's bias corrections on its update."""
        if self.decays is None:
            return 1
        b1, b2 = (jnp.asarray(decay, jnp.float32) for decay in self.decays)
        t = jnp.asarray(optax.safe_increment(count), jnp.float32)
        return jnp.sqrt(1 - b2**t) / (1 - b1**t)


@dataclasses.dataclass(frozen=True)
class Scaled(_Limited):
    """See :func:`scaled_residual`.

    Attributes:
        inside: Factor on N P^T.
        taken: Share of R P^T that is subtracted from the gradient.
    """

    inside: jax.typing.ArrayLike = 1.0
    taken: jax.typing.ArrayLike = 1.0

    def update(self, pieces: Pieces, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale (inside N P^T + limited(phi E)); see :class:`ResidualRule`."""
        view, dtype = pieces.view, pieces.basis.dtype
        assert pieces.gradient is not None
        taken = jnp.asarray(self.taken, dtype) * pieces.coordinates.astype(dtype)
        left = pieces.gradient.astype(dtype) - view.lift(taken, pieces.basis)
        left, norm = self.limited(left, -1, pieces, state)
        inside = jnp.asarray(self.inside, dtype) * pieces.narrow.astype(dtype)
        return pieces.scaled(view.lift(inside, pieces.basis) + left), norm


@dataclasses.dataclass(frozen=True)
class ScaledGradient(_Limited):
    """The gradient itself, scaled: APOLLO, see :func:`lowrank_optax.scale_by_apollo`.

    Attributes:
        by_matrix: Whether a matrix has a single phi instead of one for each row.
    """

    by_matrix: bool = False

    def update(self, pieces: Pieces, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale limited(phi G); see :class:`ResidualRule`."""
        assert pieces.gradient is not None
        gradient = pieces.gradient.astype(pieces.basis.dtype)
        axes = (-1, -2) if self.by_matrix else -1
        gradient, norm = self.limited(gradient, axes, pieces, state)
        return pieces.scaled(gradient), norm


def scaled_residual(
    growth: jax.typing.ArrayLike = 1.01,
    *,
    inside: jax.typing.ArrayLike = 1.0,
    taken: jax.typing.ArrayLike = 1.0,
    decays: Decays | None = None,
) -> Scaled:
    r"""The residual, scaled as the optimizer scales the part inside the subspace.

    For each row i of the kept side:

    .. math::
        U = \mathrm{scale} \, (\mathrm{inside} \, N P^\top
            + \mathrm{limited}(\phi (G - \mathrm{taken} \, R P^\top))), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited(S) shrinks S so that its norm is at most ``growth`` times the norm at the
    last update. With ``decays`` the limiter compares norms of S divided by
    :math:`\sqrt{1 - b_2^t} / (1 - b_1^t)`, that is without Adam's bias corrections.
    State: one norm a matrix. Every update needs the full gradient: subspace gradients
    are not possible, and ``accumulate`` adds up full gradients.

    Args:
        growth: Largest factor between the residual's norms at two successive updates;
            >= 1.
        inside: Factor on the lifted update N P^T of the inner transformation.
        taken: Share of R P^T that is subtracted from the gradient; 1: all of it.
        decays: (b1, b2) of an inner Adam, for norms without its bias corrections. None:
            the limiter compares plain norms.

    Raises:
        ValueError: If ``growth`` is below 1.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
        :func:`lowrank_optax.scale_by_fira` lists how the authors' code differs.
    """
    check_at_least("growth", growth, 1)
    return Scaled(growth, decays, inside, taken)
