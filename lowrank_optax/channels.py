"""Full gradients, each channel scaled by what an optimizer does to its projection.

The part of Fira and APOLLO that leaves the subspace: they need the full gradient at
every update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.low_rank import InsideSubspace
from lowrank_optax.sharding import stack_axes, zeros_beside
from lowrank_optax.subspace import Projector


class ChannelScaledState(NamedTuple):
    """State of Fira's and APOLLO's transformation; a tree of the parameters each.

    Attributes:
        inner_state: Of the transformation inside the subspace.
        norms: Frobenius norm of the scaled part at the last update, 0 before the first;
            (*stack,), float32; ``optax.MaskedNode()`` for leaves at full size.
    """

    inner_state: Any
    norms: Any


class ChannelScaled(NamedTuple):
    """A core: gradients scaled as ``inside`` scales their projections.

    With R = G P, N what ``inside`` makes of it, and phi_i = ||N_i|| / ||R_i|| for each
    row i of the kept side:

        U = scale (N P^T + limited(phi (G - R P^T)))    with ``keeps_subspace``
        U = scale limited(phi G)                        else

    limited(S) shrinks S to the norm ``growth`` ||S'||, S' being that of the update
    before, where it is longer.

    Attributes:
        inside: Transformation of the projected gradients, and the scale.
        keeps_subspace: Whether the update is N inside the subspace.
        by_matrix: One phi for a matrix and not for each row.
        growth: >= 1.
    """

    inside: InsideSubspace
    keeps_subspace: bool
    by_matrix: bool
    growth: jax.typing.ArrayLike

    def init(self, params, coordinates, projectors):
        """Returns the state; see :class:`lowrank_optax.low_rank.Core`."""

        def norm(path, leaf):
            if path not in projectors:
                return optax.MaskedNode()
            view = projectors[path].view
            return zeros_beside(leaf, view.stack, jnp.float32, stack_axes(view))

        return ChannelScaledState(
            self.inside.init(params, coordinates, projectors),
            jax.tree_util.tree_map_with_path(norm, params),
        )

    def check(self, coordinates, state):
        """Raises if ``inner`` needs parameters; see ``lowrank_optax.low_rank.Core``."""
        self.inside.check(coordinates, state.inner_state)

    def update(
        self, gradients, coordinates, state, bases, projectors, count, extra_args
    ):
        """Returns the updates; see :class:`lowrank_optax.low_rank.Core`."""
        del count
        narrow, inner_state = self.inside.inner.update(
            coordinates, state.inner_state, None, **extra_args
        )
        leaves, treedef = jax.tree.flatten_with_path(narrow)
        norms = treedef.flatten_up_to(state.norms)
        whole = treedef.flatten_up_to(gradients)
        projected = treedef.flatten_up_to(coordinates)
        updates = []
        for index, (path, update) in enumerate(leaves):
            if path in projectors:
                update, norms[index] = self._full(
                    whole[index],
                    projected[index],
                    update,
                    norms[index],
                    bases[path],
                    projectors[path],
                )
            updates.append(update)
        state = ChannelScaledState(inner_state, treedef.unflatten(norms))
        return treedef.unflatten(updates), state

    def _full(self, gradient, r, n, last_norm, basis, projector: Projector):
        """Returns the update of one leaf, and the norm of its scaled part."""
        view = projector.view
        n, r = n.astype(projector.dtype), r.astype(projector.dtype)
        axes = (-1, -2) if self.by_matrix else -1
        lengths = [jnp.linalg.norm(x, axis=axes, keepdims=True) for x in (n, r)]
        # A row that is zero inside its subspace says nothing of the rest of it.
        is_seen = lengths[1] > 0
        phi = jnp.where(is_seen, lengths[0] / jnp.where(is_seen, lengths[1], 1), 0)
        part = view.oriented(gradient).astype(projector.dtype)
        if self.keeps_subspace:
            part = part - jnp.einsum("...ar,...br->...ab", r, basis)
        part = phi * part
        norm = jnp.linalg.norm(part, axis=(-1, -2)).astype(jnp.float32)
        most = jnp.where(last_norm > 0, self.growth * last_norm, norm)
        shrink = jnp.minimum(norm, most) / jnp.where(norm > 0, norm, 1)
        part = part * shrink[..., None, None].astype(part.dtype)
        if self.keeps_subspace:
            part = part + jnp.einsum("...ar,...br->...ab", n, basis)
        part = part * jnp.asarray(self.inside.scale, part.dtype)
        if view.projects_rows:
            part = jnp.swapaxes(part, -1, -2)
        matrices = part.reshape(*view.stack, view.rows, view.columns)
        return view.leaf(matrices), jnp.minimum(norm, most)
