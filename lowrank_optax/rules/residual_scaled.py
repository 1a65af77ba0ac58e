"""The residual, scaled as the optimizer scales the part inside the subspace."""

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
class Scaled(OfFullGradients):
    """See :func:`scaled_residual`.

    Attributes:
        growth: Largest factor between the norms at two successive updates; >= 1.
        inside: Factor on N P^T.
        taken: Share of R P^T that is subtracted from the gradient.
        decays: b1 and b2 of Adam, if the limiter does not see its bias corrections.
        by_matrix: Whether a matrix has a single phi instead of one for each row.
        whole: Whether the gradient itself is scaled and N is dropped, as in APOLLO.
    """

    growth: jax.typing.ArrayLike
    inside: jax.typing.ArrayLike = 1.0
    taken: jax.typing.ArrayLike = 1.0
    decays: Decays | None = None
    by_matrix: bool = False
    whole: bool = False

    def init(self, view: MatrixView, leaf: Any) -> jax.Array:
        """Returns the last norm of the scaled part, 0 at first; (*stack,)."""
        return zeros_beside(leaf, view.stack, jnp.float32, stack_axes(view))

    def update(self, pieces: Pieces, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale (inside N P^T + limited(phi E)); see :class:`ResidualRule`."""
        view, dtype = pieces.view, pieces.basis.dtype
        assert pieces.gradient is not None
        part = pieces.gradient.astype(dtype)
        if not self.whole:
            taken = jnp.asarray(self.taken, dtype) * pieces.coordinates.astype(dtype)
            part = part - view.lift(taken, pieces.basis)
        part = view.oriented(part) * self._phi(pieces)
        norm = jnp.linalg.norm(part, axis=(-1, -2)).astype(jnp.float32)
        norm = norm / self._correction(pieces.count)
        most = jnp.where(state > 0, self.growth * state, norm)
        limited = jnp.minimum(norm, most)
        shrink = limited / jnp.where(norm > 0, norm, 1)
        part = view.unoriented(part * shrink[..., None, None].astype(dtype))
        if self.whole:
            return pieces.scaled(part), limited
        inside = jnp.asarray(self.inside, dtype) * pieces.narrow.astype(dtype)
        return pieces.scaled(view.lift(inside, pieces.basis) + part), limited

    def _correction(self, count: jax.Array) -> jax.typing.ArrayLike:
        """Returns the factor of Adam's bias corrections on its update."""
        if self.decays is None:
            return 1
        b1, b2 = (jnp.asarray(decay, jnp.float32) for decay in self.decays)
        t = jnp.asarray(optax.safe_increment(count), jnp.float32)
        return jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def _phi(self, pieces: Pieces) -> jax.Array:
        """Returns ||N_i|| / ||R_i|| of each row i of the kept side."""
        axes = (-1, -2) if self.by_matrix else -1
        n, r = (
            jnp.linalg.norm(x.astype(pieces.basis.dtype), axis=axes, keepdims=True)
            for x in (pieces.narrow, pieces.coordinates)
        )
        # A row that is zero inside the subspace gives no scale for its residual.
        return jnp.where(r > 0, n / jnp.where(r > 0, r, 1), 0)


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
    return Scaled(growth, inside, taken, decays)
