"""Residuals without their size: their signs, or their columns at unit length."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_optax.checks import check_at_least
from lowrank_optax.rules.residual import Pieces, Stateless, added


@dataclasses.dataclass(frozen=True)
class Sign(Stateless):
    """See :func:`sign_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w sign(E)); see :class:`ResidualRule`."""
        signs = jnp.sign(pieces.residual())
        return added(pieces, jnp.asarray(self.weight, signs.dtype) * signs), state


def sign_residual(weight: jax.typing.ArrayLike = 1.0) -> Sign:
    """The signs of the residual, as in FRUGAL.

    U = scale (N P^T + weight sign(G - R P^T)). An entry of G - R P^T counts as 0 up to
    four roundings of its row of G, and a row up to 1e-5 of G's row, as far as bases are
    from orthonormal. The rule has no state. Every update
    needs the full gradient: subspace gradients are not possible, and ``accumulate``
    adds up full gradients.

    Args:
        weight: Step of each entry, >= 0; Adam's step is about 1.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024. In the paper
        the subspace may consist of whole blocks, and the two parts have two learning
        rates. Their ratio is ``weight`` here.
    """
    check_at_least("weight", weight, 0)
    return Sign(weight)


@dataclasses.dataclass(frozen=True)
class Normalized(Stateless):
    """See :func:`normalized_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w E_j / ||E_j||); see :class:`ResidualRule`."""
        view = pieces.view
        matrices = view.matrices(pieces.residual())
        # The largest entry first: squares of others may overflow or underflow.
        peaks = jnp.max(jnp.abs(matrices), axis=-2, keepdims=True)
        shrunk = matrices / jnp.where(peaks > 0, peaks, 1)
        norms = jnp.linalg.norm(shrunk, axis=-2, keepdims=True)
        unit = shrunk / jnp.where(norms > 0, norms, 1)
        weight = jnp.asarray(self.weight, unit.dtype)
        return added(pieces, weight * view.leaf(unit)), state


def normalized_residual(weight: jax.typing.ArrayLike = 1.0) -> Normalized:
    """The residual, with each output's column at unit length.

    U = scale (N P^T + weight E_j / ||E_j||) with E = G - R P^T (n, m). The index j runs
    over the m columns, the outputs of a kernel. A zero column stays zero. The rule has
    no state. Every update needs the full gradient.

    Args:
        weight: Length of each column; >= 0.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025. The paper
        normalizes the columns of the whole gradient and has no subspace.
    """
    check_at_least("weight", weight, 0)
    return Normalized(weight)
