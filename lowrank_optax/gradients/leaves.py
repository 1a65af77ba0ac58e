"""Projected leaves on their way into a program, and their gradients out of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lowrank_optax.gradients.followed import Followed, Term
from lowrank_optax.gradients.layout import Layout
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.projected import Projected, Sketch
from lowrank_optax.sketch import sketch_beside
from lowrank_optax.subspace import Projector


class ProjectedLeaf(NamedTuple):
    """One projected leaf on its way.

    Attributes:
        projector: Projector of the leaf.
        basis: P; (*stack, b/c, r).
        omega: Test matrix of a sketch; (a*c, k). None: no sketch is wanted.
    """

    projector: Projector
    basis: jax.Array
    omega: jax.Array | None = None

    @property
    def _layout(self) -> Layout:
        return Layout(self.projector.view)

    def zeros(self, leaf: Any) -> tuple[jax.Array, ...]:
        """Returns zero coordinates, and a zero sketch if wanted, for the derivative.

        Both have shape (*atoms, columns).
        """
        projector, layout = self.projector, self._layout
        found = (layout.zeros(leaf, projector.capacity, projector.dtype),)
        if self.omega is not None:
            width = self.omega.shape[-1]
            found += (layout.sketch_zeros(leaf, width, projector.dtype),)
        return found

    def follow(self, leaf: jax.Array, arrays: Sequence[jax.Array]) -> Followed:
        """Returns the leaf as a followed array, with a term for each of its gradients.

        Args:
            leaf: The parameter.
            arrays: From :meth:`zeros`.
        """
        layout = self._layout
        bases = [layout.basis(leaf, self.basis)]
        if self.omega is not None:
            bases.append(layout.test_matrix(leaf, self.omega))
        terms = tuple(map(Term, arrays, bases))
        name = leaf_name(self.projector.path)
        return Followed(leaf, terms, layout.dims, (name,))

    def public(self, leaf: Any, arrays: Sequence[jax.Array]) -> Projected:
        """Returns the gradient, from the derivative by :meth:`zeros`."""
        like = self.projector.coordinates_beside(leaf)
        return Projected(self._layout.public(like, arrays[0]))

    def sketch(self, leaf: Any, arrays: Sequence[jax.Array]) -> Sketch | None:
        """Returns the sketch, from the derivative by :meth:`zeros`; None: none."""
        if self.omega is None:
            return None
        like = sketch_beside(leaf, self.projector, self.omega.shape[-1])
        return Sketch(self._layout.public_sketch(like, arrays[1]))
