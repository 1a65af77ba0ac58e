"""VLoRP: any transformation in a random subspace of various granularity."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.view import Side
from lowrank_optax.methods.optimizer import Mask, as_optimizer
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.random_bases import RandomBasis, gaussian
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.schedules import RefreshRule, every
from lowrank_optax.transform import scale_by_low_rank


def vlorp(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 8,
    granularity: int = 16,
    inner: optax.GradientTransformation | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "first",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    scale: jax.typing.ArrayLike = 1.0,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """VLoRP: any transformation in a random subspace of various granularity.

    Chains :func:`scale_by_vlorp`, decoupled weight decay and the learning rate.
    :func:`scale_by_vlorp` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, granularity, inner: see :func:`scale_by_vlorp`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        basis, refresh, rebase, side, dimension_numbers, scale, seed:
            see :func:`scale_by_vlorp`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        No basis in the state, and moments of 2 columns for each quarter of a row:

        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 16))}
        >>> state = vlorp(1e-3, rank=2, granularity=4).init(params)
        >>> state[0].subspaces["w"].basis, state[0].inner_state.mu["w"].shape
        ((), (256, 2))
    """
    transformation = scale_by_vlorp(
        rank,
        granularity,
        inner,
        basis=basis,
        refresh=refresh,
        rebase=rebase,
        side=side,
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_vlorp(
    rank: int = 8,
    granularity: int = 16,
    inner: optax.GradientTransformation | None = None,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "first",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    scale: jax.typing.ArrayLike = 1.0,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Any transformation in a random subspace of various granularity.

    The subspace scheme of the paper at granularity c: a random basis is drawn anew
    every 25 updates and not stored. :func:`scale_by_low_rank` documents equations,
    state and cost.

    Args:
        rank: Columns r of the bases, >= 1.
        granularity: c, >= 1. A moment takes a * (c r) numbers. c = 1 projects whole
            rows, as Flora does; c r = b would keep the whole gradient.
        inner: Transformation in the subspace; None: ``optax.scale_by_adam()``.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed basis.
        refresh: Refresh rule; None: ``every(25)``. The paper has 20 to 30.
        rebase: Re-basing rule of the moments. "first" moves the first moment, by the
            smallest gradient with this moment as its projection, and keeps the second.
            "zero" drops the first moment and sets the second to its row means. "keep"
            is the authors' code. Measured (``docs/results.md``, c = 4, r = 8): 1.971,
            1.997 and 2.016 nats per byte, where "zero" still dropped the second moment
            too. The unbiased transfer P_old^T P_new gave 2.106: it adds noise at each
            change of basis.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        scale: Factor on the updates of projected leaves.
        seed: Seed of the bases.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        `VLoRP <https://arxiv.org/abs/2505.01744>`_, 2025, the scheme SS;
        :func:`scale_by_projfactor` is the other scheme. Here the momentum follows a new
        basis, and the basis stays the same for all micro-batches of an update.
    """
    return scale_by_low_rank(
        optax.scale_by_adam() if inner is None else inner,
        rank,
        basis=gaussian() if basis is None else basis,
        refresh=every(25) if refresh is None else refresh,
        rebase=rebase,
        side=side,
        granularity=granularity,
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
