"""Rules for the residual E = G - R P^T, the part of a gradient outside the subspace.

===============  ==============================  ============================  =======
residual         update                          method                        state
===============  ==============================  ============================  =======
dropped          N P^T                           GaLore, AdaRankGrad, SUMO     none
scaled           N P^T + limited(phi E)          Fira                          a number
sign             N P^T + w sign(E)               FRUGAL                        none
normalized       N P^T + w E_j / ||E_j||         SCALE, beside a subspace      none
orthogonalized   orth(N P^T + w E)               low_rank_muon                 none
===============  ==============================  ============================  =======

R = G P, and N is the inner transformation's update of R. "A number" is per matrix. All
rules but "dropped" need the full gradient at every update.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.orthonormal import TOLERANCE

# Of R = G P, of R P^T, of the difference, and of P itself.
ROUNDINGS = 4


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The parts of one projected leaf's update.

    Attributes:
        view: The leaf as matrices.
        gradient: G, in the leaf's shape; None, if the gradient came projected.
        coordinates: R; (*stack, a*c, r).
        narrow: N; (*stack, a*c, r).
        basis: P; (*stack, b/c, r), in the dtype of the computation.
        scale: Factor on the update.
        count: Updates done.
    """

    view: MatrixView
    gradient: jax.Array | None
    coordinates: jax.Array
    narrow: jax.Array
    basis: jax.Array
    scale: jax.typing.ArrayLike
    count: jax.Array

    def scaled(self, array: jax.Array) -> jax.Array:
        """Returns an array times the scale; without a product, if the scale is 1."""
        if isinstance(self.scale, (int, float)) and self.scale == 1:
            return array
        return array * jnp.asarray(self.scale, array.dtype)

    def beside(self, inside: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
        """Returns (inside) P^T + weight E in the leaf's shape, by one lift.

        Args:
            inside: Coordinates; (*stack, a*c, r).
            weight: Weight of the residual.
        """
        assert self.gradient is not None
        dtype = self.basis.dtype
        weight = jnp.asarray(weight, dtype)
        both = inside.astype(dtype) - weight * self.coordinates.astype(dtype)
        whole = self.view.lift(both, self.basis)
        return whole + weight * self.gradient.astype(dtype)

    def residual(self) -> jax.Array:
        """Returns E = G - R P^T in the leaf's shape, 0 where it is rounding alone.

        Signs and unit columns would make steps of rounding. A row of E counts as
        rounding up to 1e-5 of the norm of G's row, as far as bases are from
        orthonormal, and an entry up to 4 eps of it.
        """
        view, dtype = self.view, self.basis.dtype
        assert self.gradient is not None
        rest = view.oriented(self.beside(jnp.zeros_like(self.coordinates), 1))
        rows = view.oriented(self.gradient.astype(dtype))
        # The largest entry first: squares of others may overflow or underflow.
        peak = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
        peak = jnp.where(peak > 0, peak, 1)
        size = jnp.linalg.norm(rows / peak, axis=-1, keepdims=True)
        shrunk = jnp.abs(rest) / peak
        length = jnp.linalg.norm(shrunk, axis=-1, keepdims=True)
        is_real = shrunk > ROUNDINGS * jnp.finfo(dtype).eps * size
        is_real &= length > TOLERANCE * size
        return view.unoriented(jnp.where(is_real, rest, 0))


class ResidualRule(Protocol):
    """The interface of a residual rule for ``scale_by_low_rank``."""

    @property
    def needs_full_gradients(self) -> bool:
        """Whether every update needs the full gradient."""
        ...

    def init(self, view: MatrixView, leaf: Any) -> Any:
        """Returns the rule's own state of one leaf: a pytree, () for most.

        Args:
            view: The leaf as matrices.
            leaf: The parameter; only its sharding counts.
        """
        ...

    def update(self, pieces: Pieces, state: Any) -> tuple[jax.Array, Any]:
        """Returns the update of a projected leaf, in its shape, and the new state."""
        ...

    def at_full_size(self, update: jax.Array, view: MatrixView | None) -> jax.Array:
        """Returns the update of a leaf that is not projected, where R = G and E = 0.

        Args:
            update: The inner transformation's update of the leaf.
            view: The leaf as matrices; None, if the leaf has no matrix.
        """
        ...


@dataclasses.dataclass(frozen=True)
class OfFullGradients:
    """Shared by the rules that need every full gradient."""

    @property
    def needs_full_gradients(self) -> bool:
        """Returns True; see :class:`ResidualRule`."""
        return True

    def at_full_size(self, update: jax.Array, view: MatrixView | None) -> jax.Array:
        """Returns the update as it is; see :class:`ResidualRule`."""
        del view
        return update


@dataclasses.dataclass(frozen=True)
class Stateless(OfFullGradients):
    """Shared by the rules without a state."""

    def init(self, view: MatrixView, leaf: Any) -> tuple[()]:
        """Returns no state; see :class:`ResidualRule`."""
        del view, leaf
        return ()


@dataclasses.dataclass(frozen=True)
class Dropped(Stateless):
    """The rule that drops the residual: the update is N P^T."""

    @property
    def needs_full_gradients(self) -> bool:
        """Returns False; see :class:`ResidualRule`."""
        return False

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale N P^T; see :class:`ResidualRule`."""
        # The scale multiplies the small factor.
        narrow = pieces.scaled(pieces.narrow.astype(pieces.basis.dtype))
        return pieces.view.lift(narrow, pieces.basis), state


def added(pieces: Pieces, part: jax.Array) -> jax.Array:
    """Returns scale (N P^T + part), ``part`` in the leaf's shape."""
    inside = pieces.view.lift(pieces.narrow.astype(pieces.basis.dtype), pieces.basis)
    return pieces.scaled(inside + part)
