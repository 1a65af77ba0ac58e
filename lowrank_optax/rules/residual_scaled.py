"""The residual scaled as the optimizer scales what the subspace holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.sharding import stack_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.residual import Pieces

# b1 and b2 of Adam.
Decays = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """See :func:`scaled_residual`.

    Attributes:
        growth: >= 1.
        inside: Factor on N P^T.
        taken: Share of R P^T that is taken off the gradient.
        decays: Of the Adam whose bias corrections the limiter does not see; or None.
        by_matrix: One phi for a matrix and not for each row.
        whole: Whether it is the gradient itself that is scaled, N dropped: APOLLO.
    """

    growth: jax.typing.ArrayLike
    inside: jax.typing.ArrayLike = 1.0
    taken: jax.typing.ArrayLike = 1.0
    decays: Decays | None = None
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
        """Returns what Adam's bias corrections multiply its update by."""
        if self.decays is None:
            return 1
        b1, b2 = (jnp.asarray(decay, jnp.float32) for decay in self.decays)
        return jnp.sqrt(1 - b2 ** (count + 1)) / (1 - b1 ** (count + 1))

    def _phi(self, pieces: Pieces) -> jax.Array:
        """Returns ||N_i|| / ||R_i|| of each row i of the kept side."""
        axes = (-1, -2) if self.by_matrix else -1
        n, r = (
            jnp.linalg.norm(x.astype(pieces.basis.dtype), axis=axes, keepdims=True)
            for x in (pieces.narrow, pieces.coordinates)
        )
        # A row that is zero inside its subspace says nothing of the rest of it.
        return jnp.where(r > 0, n / jnp.where(r > 0, r, 1), 0)


def scaled_residual(
    growth: jax.typing.ArrayLike = 1.01,
    *,
    inside: jax.typing.ArrayLike = 1.0,
    taken: jax.typing.ArrayLike = 1.0,
    decays: Decays | None = None,
) -> Scaled:
    r"""What the subspace does not hold, scaled as the optimizer scales what it does.

    For each row i of the kept side

    .. math::
        U = \mathrm{scale} \, (\mathrm{inside} \, N P^\top
            + \mathrm{limited}(\phi (G - \mathrm{taken} \, R P^\top))), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited(S) shrinks S to ``growth`` times the norm that it had at the update before,
    where it is longer. With ``decays`` these are the norms of S divided by
    :math:`\sqrt{1 - b_2^t} / (1 - b_1^t)`, which is what S would be without Adam's bias
    corrections. State: one number a matrix, that norm. Needs the full gradient at every
    update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        growth: Largest growth of the residual's norm from one update to the next; >= 1.
        inside: Factor on what the inner transformation makes of the gradient inside.
        taken: Share of the gradient inside the subspace that is taken off it; 1: all.
        decays: (b1, b2) of an inner Adam whose bias corrections the limiter is not to
            see. None: it compares norms as they are.

    Raises:
        ValueError: If ``growth`` is below 1.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
        :func:`lowrank_optax.fira` says where its authors' code differs.
    """
    check_growth(growth)
    return Scaled(growth, inside, taken, decays)


def check_growth(growth: jax.typing.ArrayLike) -> None:
    """Raises ValueError if the limiter's growth is below 1."""
    if isinstance(growth, (int, float)) and growth < 1:
        raise ValueError(f"growth must be >= 1, got {growth}.")
