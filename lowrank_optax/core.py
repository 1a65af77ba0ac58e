"""Cores: the part of a low-rank transformation between projection and lift."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import LowRankDimensionNumbers
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.residual import Pieces, ResidualRule
from lowrank_optax.subspace import Projector, Subspace


class InLeaf(NamedTuple):
    """One projected leaf during an update.

    Attributes:
        projector: Projector of the leaf.
        subspace: Subspace of the leaf, renewed.
        basis: P; (*stack, b/c, r).
        gradient: Full gradient; None, if the gradient came projected.
    """

    projector: Projector
    subspace: Subspace
    basis: jax.Array
    gradient: jax.Array | None


Views = Mapping[tuple, MatrixView | None]
"""Key path -> view of the leaf as matrices; None for a leaf without a matrix."""

NumbersByPath = Mapping[tuple, LowRankDimensionNumbers | None]
"""Key path -> axes of the matrix in an inner transformation's gradient, or None."""

Inner = (
    optax.GradientTransformation
    | Callable[[NumbersByPath], optax.GradientTransformation]
)
"""An inner transformation, or a function from dimension numbers to one."""


class Core(Protocol):
    """The interface of a core: a transformation of projected gradients."""

    def init(
        self,
        params: Any,
        coordinates: Any,
        projectors: Mapping[tuple, Projector],
        views: Views,
    ) -> Any:
        """Returns the state of the core.

        Args:
            params: Parameters, or their shapes. Only shapes and shardings count.
            coordinates: Tree like the parameters; a projected leaf has shape
                (*stack, a*c, r).
            projectors: Projectors of the projected leaves.
            views: Views of all leaves.
        """
        ...

    def check(
        self,
        coordinates: Any,
        state: Any,
        projectors: Mapping[tuple, Projector],
        views: Views,
    ) -> None:
        """Raises ValueError if the core cannot run with these parameters."""
        ...

    def update(
        self,
        coordinates: Any,
        state: Any,
        leaves: Mapping[tuple, InLeaf],
        views: Views,
        count: jax.Array,
        extra_args: Mapping[str, Any],
    ) -> tuple[Any, Any, Mapping[tuple, Any]]:
        """Returns full updates, the core's new state, and the residual rule's states.

        Args:
            coordinates: Gradients; a projected leaf has shape (*stack, a*c, r).
            state: State of the core.
            leaves: The projected leaves by their key paths.
            views: Views of all leaves.
            count: Updates done; (), int32.
            extra_args: Extra arguments of an inner transformation.
        """
        ...


class InsideSubspace(NamedTuple):
    """The core of :func:`scale_by_low_rank`: any transformation, then the lift."""

    inner: Inner
    residual: ResidualRule
    scale: jax.typing.ArrayLike

    def init(self, params, coordinates, projectors, views):
        """Returns the state of ``inner``; see :class:`Core`."""
        del params
        return self._inner(views, projectors).init(coordinates)

    def check(self, coordinates, state, projectors, views):
        """Raises if ``inner`` needs parameters; see :class:`Core`."""
        if jax.tree.leaves(coordinates):
            inner = self._inner(views, projectors)
            _check_needs_no_params(inner, coordinates, state)

    def update(self, coordinates, state, leaves, views, count, extra_args):
        """Returns scale N P^T plus the residual's part; see :class:`Core`."""
        inner = self._inner(views, leaves)
        narrow, state = inner.update(coordinates, state, None, **extra_args)
        residuals = {}

        def lifted(path, n, r):
            if path not in leaves:
                return self.residual.at_full_size(n, views[path])
            projector, subspace, basis, gradient = leaves[path]
            pieces = Pieces(projector.view, gradient, r, n, basis, self.scale, count)
            update, residuals[path] = self.residual.update(pieces, subspace.residual)
            return update

        updates = jax.tree_util.tree_map_with_path(lifted, narrow, coordinates)
        return updates, state, residuals

    def _inner(
        self, views: Views, projected: Mapping[tuple, Any]
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the inner transformation, made for the axes of these leaves."""
        if not callable(self.inner):
            return optax.with_extra_args_support(self.inner)
        in_subspace = LowRankDimensionNumbers(-2, -1)

        def numbers(path, view):
            if path in projected:
                return in_subspace
            return None if view is None else view.numbers

        by_path = {path: numbers(path, view) for path, view in views.items()}
        return optax.with_extra_args_support(self.inner(by_path))


def _check_needs_no_params(inner, coordinates, state) -> None:
    """Raises if ``inner`` needs parameters."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (coordinates, state)
    )
    try:
        jax.eval_shape(lambda u, s: inner.update(u, s, None), *like)
    except Exception as error:
        # Raise only if parameters were missing: other faults surface in update.
        try:
            jax.eval_shape(lambda u, s: inner.update(u, s, u), *like)
        except Exception:
            return
        raise ValueError(
            "the inner transformation of scale_by_low_rank needs parameters, but a "
            "subspace has no parameters; put weight decay and the like outside: "
            "optax.chain(scale_by_low_rank(optax.scale_by_adam(), ...), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))."
        ) from error
