"""ProjFactor: momentum in the subspace, a factored second moment at full size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrix.boxes import is_box
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.sharding import basis_axes, coordinate_axes, zeros_beside
from lowrank_optax.matrix.view import Side
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.parts import make_parts
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.random_bases import RandomBasis, gaussian
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.schedules import RefreshRule, every
from lowrank_optax.subspace import Projector
from lowrank_optax.transform import low_rank_transformation


class ScaleByProjfactorState(NamedTuple):
    """Moments of :func:`scale_by_projfactor`, trees like the parameters.

    Attributes:
        mu: First moment in the subspace; (*stack, a*c, r), float32 or wider. A leaf at
            full size has ``optax.MaskedNode()`` in the first three trees.
        v_row: Second moment, summed over columns; (*stack, a*c), float32 or wider.
        v_col: Second moment, summed over rows; (*stack, b/c), float32 or wider.
        rest: State of ``optax.scale_by_adam`` for the leaves at full size.
    """

    mu: Any
    v_row: Any
    v_col: Any
    rest: optax.OptState


def projfactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 8,
    granularity: int = 16,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "first",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """ProjFactor: Adam with subspace momentum and a factored second moment.

    Chains :func:`scale_by_projfactor`, decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, granularity, b1, b2, eps: see :func:`scale_by_projfactor`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        basis, refresh, rebase: see :func:`scale_by_projfactor`.
        side, dimension_numbers, seed: see :func:`scale_by_projfactor`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.
    """
    return as_optimizer(
        scale_by_projfactor(
            rank,
            granularity,
            b1,
            b2,
            eps,
            basis=basis,
            refresh=refresh,
            rebase=rebase,
            side=side,
            dimension_numbers=dimension_numbers,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def scale_by_projfactor(
    rank: int = 8,
    granularity: int = 16,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "first",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with momentum in a subspace and a factored second moment at full size.

    At granularity c an oriented gradient matrix is seen as G_t (a c, b/c). With its
    projection G_s = G_t P and G_o = G_s P^T:

    .. math::
        m &\leftarrow b_1 m + (1 - b_1) G_s \\
        v_r &\leftarrow b_2 v_r + (1 - b_2) \, \mathrm{rowsums}(G_o^2), \quad
        v_c \leftarrow b_2 v_c + (1 - b_2) \, \mathrm{colsums}(G_o^2) \\
        U_t &= \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \,
        \frac{m P^\top}{\sqrt{v_r v_c^\top / \mathrm{sum}(v_r)} + \epsilon}

    Neither G_o nor the second moment is ever formed. The sums are quadratic forms of
    (r, r) matrices, and the division happens where U_t is written.

    The state of a projected matrix: a c r + a c + b/c numbers, float32, and a few
    scalars; b r / c more for a computed basis. An update costs 4 a b r flops for
    projection and lift, about 2 (a c + b/c) r^2 multiplications for the sums, and
    b r / c random numbers for a random basis. Adam updates leaves at full size.

    Args:
        rank: Columns r of the bases, >= 1.
        granularity: c, >= 1. Where c does not divide b, the largest divisor below c is
            used. The momentum takes a * (c r) numbers.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed basis.
        refresh: Refresh rule; None: ``every(25)``.
        rebase: Re-basing rule of the momentum. "first" projects the smallest gradient
            with this momentum as its projection. "zero" drops the momentum. "keep" does
            not change the momentum, as in the authors' code. Measured
            (``docs/results.md``, c = 4, r = 8): 1.993, 1.983 and 2.019 nats per byte,
            one seed.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.

    Returns:
        A transformation. Its ``update`` needs ``params`` for projected gradients.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> params = {"w": jnp.ones((64, 16))}
        >>> state = scale_by_projfactor(rank=2, granularity=4).init(params)
        >>> moments = state.inner_state
        >>> moments.mu["w"].shape, moments.v_row["w"].shape, moments.v_col["w"].shape
        ((256, 2), (256,), (4,))

    References:
        `VLoRP and ProjFactor <https://arxiv.org/abs/2505.01744>`_, 2025. The paper's
        ``scale`` cancels out and is left out here. In the paper a granularity must
        divide b. Here the momentum follows a new basis, and the basis stays the same
        for all micro-batches of an update.
    """
    checked_adam(b1, b2, eps)
    parts = make_parts(
        rank=rank,
        basis=gaussian() if basis is None else basis,
        refresh=every(25) if refresh is None else refresh,
        rebase=rebase,
        side=side,
        granularity=granularity,
        dimension_numbers=dimension_numbers,
        # The second moment is of lifted gradients: a new basis does not change it.
        moments={"v_row": "constant", "v_col": "constant"},
        seed=seed,
    )
    return low_rank_transformation(FactoredAtFullSize(b1, b2, eps), parts)


class FactoredAtFullSize(NamedTuple):
    """The core of :func:`scale_by_projfactor`."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)

    def init(self, params, coordinates, projectors, views):
        """Returns zeros; see :class:`lowrank_optax.core.Core`."""
        del views

        def zeros(shape_and_axes):
            def per_leaf(path, leaf):
                if path not in projectors:
                    return optax.MaskedNode()
                shape, axes = shape_and_axes(projectors[path])
                return zeros_beside(leaf, shape, projectors[path].dtype, axes)

            return jax.tree_util.tree_map_with_path(per_leaf, params, is_leaf=is_box)

        return ScaleByProjfactorState(
            mu=zeros(lambda p: (p.shape, coordinate_axes(p.view))),
            v_row=zeros(lambda p: (p.shape[:-1], coordinate_axes(p.view)[:-1])),
            v_col=zeros(lambda p: (p.basis_shape[:-1], basis_axes(p.view)[:-1])),
            rest=self._adam.init(_unprojected(coordinates, projectors)),
        )

    def check(self, coordinates, state, projectors, views):
        """Does nothing; see :class:`lowrank_optax.core.Core`."""

    def update(self, coordinates, state, leaves, views, count, extra_args):
        """Returns the updates; see :class:`lowrank_optax.core.Core`."""
        del views, extra_args
        rest = _unprojected(coordinates, leaves)
        others, rest_state = self._adam.update(rest, state.rest)
        gradients, treedef = jax.tree_util.tree_flatten_with_path(coordinates)
        updates = treedef.flatten_up_to(others)
        moments = [treedef.flatten_up_to(tree) for tree in state[:3]]
        t = optax.safe_increment(count)
        correction = jnp.sqrt(1 - self.b2**t) / (1 - self.b1**t)
        for index, (path, gradient) in enumerate(gradients):
            if path not in leaves:
                continue
            mu, v_row, v_col = (moment[index] for moment in moments)
            basis, projector = leaves[path].basis, leaves[path].projector
            rows, columns = squared_sums(gradient, basis)
            mu = self.b1 * mu + (1 - self.b1) * gradient
            v_row = self.b2 * v_row + (1 - self.b2) * rows
            v_col = self.b2 * v_col + (1 - self.b2) * columns
            lifting = correction * basis  # the smaller factor of the lift
            updates[index] = self._step(mu, v_row, v_col, lifting, projector)
            for moment, new in zip(moments, (mu, v_row, v_col), strict=True):
                moment[index] = new.astype(moment[index].dtype)
        mu, v_row, v_col = map(treedef.unflatten, moments)
        new_state = ScaleByProjfactorState(mu, v_row, v_col, rest_state)
        return treedef.unflatten(updates), new_state, {}

    def _step(self, mean, v_row, v_col, basis, projector: Projector) -> jax.Array:
        """Returns M P^T / (sqrt(outer(v_row, v_col) / sum(v_row)) + eps)."""
        total = jnp.sum(v_row, axis=-1, keepdims=True)
        row = jnp.sqrt(v_row / jnp.where(total > 0, total, 1))
        view = projector.view
        # The outer product is a lift of rank one.
        root = view.lift_blocks(row[..., None], jnp.sqrt(v_col)[..., None])
        return view.unblocked(view.lift_blocks(mean, basis) / (root + self.eps))


def squared_sums(
    coordinates: jax.Array, basis: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the row sums and the column sums of (G P^T)^2, entry by entry.

    G P^T is not formed. The sum of row i is the quadratic form of P^T P in the i-th row
    of G; the sum of column j is the quadratic form of G^T G in the j-th row of P. Cost:
    2 (a + b) r^2 multiplications.

    Args:
        coordinates: G; (*stack, a, r).
        basis: P; (*stack, b, r).

    Returns:
        (*stack, a) and (*stack, b), never negative.
    """
    return _quadratic(coordinates, basis), _quadratic(basis, coordinates)


def _quadratic(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns sum_j (left right^T)_ij^2, (*stack, rows of left)."""
    products = jnp.einsum("...ir,...is->...rs", right, right)
    turned = jnp.einsum("...ir,...rs->...is", left, products)
    # Rounding may leave a sum slightly below zero.
    return jnp.maximum(jnp.sum(turned * left, axis=-1), 0)


def _unprojected(tree: Any, projectors: Mapping[tuple, Any]) -> Any:
    """Returns the tree with ``optax.MaskedNode()`` for each projected leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: optax.MaskedNode() if path in projectors else x,
        tree,
        is_leaf=is_box,
    )
