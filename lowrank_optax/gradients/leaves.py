"""Projected leaves on their way into a program, and their gradients out of it."""

from typing import Any, NamedTuple

import jax

from lowrank_optax.gradients.followed import Followed, Term
from lowrank_optax.gradients.layout import Layout
from lowrank_optax.subspace import Projector


class ProjectedLeaf(NamedTuple):
    """One projected leaf: its projector, and its basis (*stack, b/c, r)."""

    projector: Projector
    basis: jax.Array

    @property
    def _layout(self) -> Layout:
        return Layout(self.projector.view)

    def zeros(self, leaf: Any) -> jax.Array:
        """Returns zero coordinates, (*atoms, r), for the derivative."""
        projector = self.projector
        return self._layout.zeros(leaf, projector.capacity, projector.dtype)

    def follow(self, leaf: jax.Array, coordinates: jax.Array) -> Followed:
        """Returns the leaf as a followed array."""
        term = Term(coordinates, self._layout.basis(leaf, self.basis))
        name = jax.tree_util.keystr(self.projector.path)
        return Followed(leaf, (term,), self._layout.dims, (name,))

    def public(self, leaf: Any, coordinates: jax.Array) -> jax.Array:
        """Returns the gradient (*stack, a*c, r) of coordinates (*atoms, r)."""
        like = self.projector.coordinates_beside(leaf)
        return self._layout.public(like, coordinates)
