"""The residual scaled as the optimizer scales what the subspace holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import stack_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.residual import Pieces, added


@dataclasses.dataclass(frozen=True)
class Scaled:
    """See :func:`scaled_residual`.

    Attributes:
        growth: >= 1.
        by_matrix: One phi for a matrix and not for each row.
        whole: Whether it is the gradient itself that is scaled, N dropped: APOLLO.
    """

    growth: jax.typing.ArrayLike
    by_matrix: bool = False
    whole: bool = False

    @property
    def needs_full_gradients(self) -> bool:
        """Returns True; see :class:`ResidualRule`."""
        return True

    def init(self, view: MatrixView, leaf: Any) -> jax.Array:
        """Returns the norm of the scaled part, 0 before the first; (*stack,)."""
        return zeros_beside(leaf, view.stack, jnp.float32, stack_axes(view))

    def at_full_size(self, update: jax.Array, view: MatrixView | None) -> jax.Array:
        """Returns the update as it is; see :class:`ResidualRule`."""
        del view
        return update

    def update(self, pieces: Pieces, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale (N P^T + limited(phi E)); see :class:`ResidualRule`."""
        view, dtype = pieces.view, pieces.basis.dtype
        if self.whole:
            assert pieces.gradient is not None
            part = pieces.gradient.astype(dtype)
        else:
            part = pieces.residual()
        part = view.oriented(part) * self._phi(pieces)
        norm = jnp.linalg.norm(part, axis=(-1, -2)).astype(jnp.float32)
        most = jnp.where(state > 0, self.growth * state, norm)
        limited = jnp.minimum(norm, most)
        shrink = limited / jnp.where(norm > 0, norm, 1)
        part = view.unoriented(part * shrink[..., None, None].astype(dtype))
        if not self.whole:
            return added(pieces, part), limited
        return pieces.scaled(part), limited

    def _phi(self, pieces: Pieces) -> jax.Array:
        """Returns ||N_i|| / ||R_i|| of each row i of the kept side."""
        axes = (-1, -2) if self.by_matrix else -1
        n, r = (
            jnp.linalg.norm(x.astype(pieces.basis.dtype), axis=axes, keepdims=True)
            for x in (pieces.narrow, pieces.coordinates)
        )
        # A row that is zero inside its subspace says nothing of the rest of it.
        return jnp.where(r > 0, n / jnp.where(r > 0, r, 1), 0)


def scaled_residual(growth: jax.typing.ArrayLike = 1.01) -> Scaled:
    r"""What the subspace does not hold, scaled as the optimizer scales what it does.

    For each row i of the kept side

    .. math::
        U = \mathrm{scale} \, (N P^\top + \mathrm{limited}(\phi (G - R P^\top))), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited(S) shrinks S to ``growth`` times the norm that it had at the update before,
    where it is longer. State: one number a matrix, that norm. Needs the full gradient
    at every update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        growth: Largest growth of the residual's norm from one update to the next; >= 1.

    Raises:
        ValueError: If ``growth`` is below 1.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
    """
    check_growth(growth)
    return Scaled(growth)


def check_growth(growth: jax.typing.ArrayLike) -> None:
    """Raises ValueError if the limiter's growth is below 1."""
    if isinstance(growth, (int, float)) and growth < 1:
        raise ValueError(f"growth must be >= 1, got {growth}.")
