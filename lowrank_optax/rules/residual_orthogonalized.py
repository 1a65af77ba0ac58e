"""The residual, orthogonalized together with the part inside the subspace."""

import dataclasses

import jax

from lowrank_optax.checks import check_at_least, check_decay
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.newton_schulz import (
    Coefficients,
    Triples,
    as_steps,
    coefficients_of,
    orthogonalized,
)
from lowrank_optax.rules.residual import Pieces, Stateless


@dataclasses.dataclass(frozen=True)
class Orthogonalized(Stateless):
    """See :func:`orthogonalized_residual`."""

    weight: jax.typing.ArrayLike
    ns_steps: jax.typing.ArrayLike
    rms: jax.typing.ArrayLike
    coefficients: Triples

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale orth(N P^T + w E); see :class:`ResidualRule`."""
        view = pieces.view
        whole = view.matrices(pieces.beside(pieces.narrow, self.weight))
        assert pieces.gradient is not None
        # In the gradient's dtype, as Muon does: half the bytes take half the time.
        orthogonal = self._orthogonal(whole.astype(pieces.gradient.dtype))
        return pieces.scaled(view.leaf(orthogonal)), state

    def at_full_size(self, update: jax.Array, view: MatrixView | None) -> jax.Array:
        """Returns the orthogonal factor of matrices; vectors as they are."""
        if view is None:
            return update
        return view.leaf(self._orthogonal(view.matrices(update)))

    def _orthogonal(self, matrices: jax.Array) -> jax.Array:
        # The longer side is kept, and has its full length in the subspace too.
        scale = self.rms * max(matrices.shape[-2:]) ** 0.5
        return orthogonalized(matrices, self.ns_steps, self.coefficients) * scale


def orthogonalized_residual(
    weight: jax.typing.ArrayLike = 4.0,
    ns_steps: jax.typing.ArrayLike = 5,
    rms: jax.typing.ArrayLike = 0.2,
    ns_coefficients: Coefficients = "muon",
) -> Orthogonalized:
    r"""The residual, orthogonalized together with the part inside the subspace.

    U = scale rms sqrt(a) orth(N P^T + weight (G - R P^T)), with orth(U S V^T) = U V^T
    and the longer side a. Every direction of a matrix gets a step of the same size.
    Matrices at full size are orthogonalized too. The rule has no state. It costs
    ``ns_steps`` Newton-Schulz steps at full size, and needs the full gradient at
    every update. Compiled under ``jax.set_mesh(mesh)``, each device orthogonalizes its
    share of a stack of layers.

    Args:
        weight: Weight of the residual; >= 0.
        ns_steps: Newton-Schulz steps, >= 1. Five of them bring singular values to
            0.7 ... 1.2, and those under 1/500 of the norm to less.
        rms: Root mean square of an update of full rank, in [0, 1).
        ns_coefficients: See :func:`lowrank_optax.scale_by_sumo`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    check_at_least("weight", weight, 0)
    check_decay("rms", rms)
    steps, coefficients = as_steps(ns_steps), coefficients_of(ns_coefficients)
    return Orthogonalized(weight, steps, rms, coefficients)
