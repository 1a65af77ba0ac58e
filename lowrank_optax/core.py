"""What a low-rank transformation does with gradients once they are projected."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from lowrank_optax.rules.residual import Pieces, ResidualRule
from lowrank_optax.subspace import Projector, Subspace


class InLeaf(NamedTuple):
    """One projected leaf during an update.

    Attributes:
        projector: How it is projected.
        subspace: Its subspace, renewed.
        basis: P; (*stack, b/c, r).
        gradient: At full size; None, if it came projected.
    """

    projector: Projector
    subspace: Subspace
    basis: jax.Array
    gradient: jax.Array | None


class Core(Protocol):
    """What a low-rank transformation does with gradients that are projected."""

    def init(
        self, params: Any, coordinates: Any, projectors: Mapping[tuple, Projector]
    ) -> Any:
        """Returns its state.

        Args:
            params: Parameters, or their shapes; only those and shardings count.
            coordinates: Tree like the parameters; a projected leaf has shape
                (*stack, a*c, r).
            projectors: Of the projected leaves.
        """
        ...

    def check(self, coordinates: Any, state: Any) -> None:
        """Raises ValueError if something else is wrong with the state."""
        ...

    def update(
        self,
        coordinates: Any,
        state: Any,
        leaves: Mapping[tuple, InLeaf],
        count: jax.Array,
        extra_args: Mapping[str, Any],
    ) -> tuple[Any, Any, Mapping[tuple, Any]]:
        """Returns updates at full size, its new state, and the residual rule's states.

        Args:
            coordinates: Gradients; those of projected leaves are (*stack, a*c, r).
            state: Of the core.
            leaves: The projected leaves by their key paths.
            count: Updates done; (), int32.
            extra_args: For an inner transformation.
        """
        ...


class InsideSubspace(NamedTuple):
    """The core of :func:`scale_by_low_rank`: any transformation, then the lift."""

    inner: optax.GradientTransformationExtraArgs
    residual: ResidualRule
    scale: jax.typing.ArrayLike

    def init(self, params, coordinates, projectors):
        """Returns the state of ``inner``; see :class:`Core`."""
        del params, projectors
        return self.inner.init(coordinates)

    def check(self, coordinates, state):
        """Raises if ``inner`` needs parameters; see :class:`Core`."""
        if jax.tree.leaves(coordinates):
            _check_needs_no_params(self.inner, coordinates, state)

    def update(self, coordinates, state, leaves, count, extra_args):
        """Returns scale N P^T and what the residual adds; see :class:`Core`."""
        narrow, state = self.inner.update(coordinates, state, None, **extra_args)
        residuals = {}

        def lifted(path, n, r):
            if path not in leaves:
                return self.residual.at_full_size(n)
            projector, subspace, basis, gradient = leaves[path]
            pieces = Pieces(projector.view, gradient, r, n, basis, self.scale, count)
            update, residuals[path] = self.residual.update(pieces, subspace.residual)
            return update

        updates = jax.tree_util.tree_map_with_path(lifted, narrow, coordinates)
        return updates, state, residuals


def _check_needs_no_params(inner, coordinates, state) -> None:
    """Raises if ``inner`` needs parameters."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (coordinates, state)
    )
    try:
        jax.eval_shape(lambda u, s: inner.update(u, s, None), *like)
    except Exception as error:
        # Only if parameters are what was missing: other faults surface in update.
        try:
            jax.eval_shape(lambda u, s: inner.update(u, s, u), *like)
        except Exception:
            return
        raise ValueError(
            "the inner transformation of scale_by_low_rank needs parameters, which "
            "have no meaning in the subspace; put weight decay and the like outside: "
            "optax.chain(scale_by_low_rank(optax.scale_by_adam(), ...), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))."
        ) from error
