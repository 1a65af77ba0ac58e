"""Residuals without size: their signs, or their columns at length one."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_optax.rules.residual import Pieces, Stateless, added, check_weight


@dataclasses.dataclass(frozen=True)
class Sign(Stateless):
    """See :func:`sign_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w sign(E)); see :class:`ResidualRule`."""
        signs = jnp.sign(pieces.residual())
        return added(pieces, jnp.asarray(self.weight, signs.dtype) * signs), state


def sign_residual(weight: jax.typing.ArrayLike = 1.0) -> Sign:
    """The signs of what the subspace does not hold, as FRUGAL adds them.

    U = scale (N P^T + weight sign(G - R P^T)). No state. Needs the full gradient at
    every update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        weight: Step of each entry, where Adam's is about 1; >= 0.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024: there the
        subspace may be made of whole blocks, and the two parts have learning rates of
        their own, whose ratio is ``weight`` here.
    """
    check_weight(weight)
    return Sign(weight)


@dataclasses.dataclass(frozen=True)
class Normalized(Stateless):
    """See :func:`normalized_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w E_j / ||E_j||); see :class:`ResidualRule`."""
        view = pieces.view
        matrices = view.matrices(pieces.residual())
        norms = jnp.linalg.norm(matrices, axis=-2, keepdims=True)
        unit = matrices / jnp.where(norms > 0, norms, 1)
        weight = jnp.asarray(self.weight, unit.dtype)
        return added(pieces, weight * view.leaf(unit)), state


def normalized_residual(weight: jax.typing.ArrayLike = 1.0) -> Normalized:
    """What the subspace does not hold, each output's column at length one.

    U = scale (N P^T + weight E_j / ||E_j||) with E = G - R P^T (n, m) and j over its m
    columns, the outputs of a kernel; a column of zeros stays zero. No state. Needs the
    full gradient at every update.

    Args:
        weight: Length of each column; >= 0.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025, which
        normalizes the columns of the whole gradient and has no subspace.
    """
    check_weight(weight)
    return Normalized(weight)
