"""The methods by name: short aliases of ``scale_by_low_rank`` with the parts chosen."""

import jax
import optax

from lowrank_optax.alias import Mask, as_optimizer, checked_adam
from lowrank_optax.bases import BasisRule, exact_svd, range_finder
from lowrank_optax.low_rank import scale_by_low_rank
from lowrank_optax.matrices import DimensionNumbers, Side
from lowrank_optax.projfactor import scale_by_projfactor
from lowrank_optax.random_bases import RandomBasis, gaussian
from lowrank_optax.ranks import FixedRank, RankRule, as_rank_rule, energy_rank
from lowrank_optax.rebase import RebaseRule
from lowrank_optax.refresh import RefreshRule, every, on_convergence


def adarankgrad(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    threshold: jax.typing.ArrayLike = 0.0003,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad: Adam in a subspace whose rank and moment of renewal adapt.

    ``scale_by_low_rank`` around ``optax.scale_by_adam`` with the rank by energy, a
    randomized basis, renewal on convergence, and moments re-based; then decoupled
    weight decay and the learning rate. Equations, state and cost:
    :func:`scale_by_low_rank`.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Capacity, the largest rank, >= 1, with seven eighths of it as the least
            one: ranks that fell lower cost loss (``RESULTS.md``). Or a rank rule, which
            then replaces ``threshold`` too: ``energy_rank(128, 0.05, min_rank=4)`` for
            ranks that fall as the paper's do, and bytes that :func:`compact
            <lowrank_optax.compact>` can free; or a :func:`lowrank_optax.budget` of
            bytes.
        threshold: Share of a gradient's squared norm that its subspace may lose; in
            (0, 1). Of ``energy_rank`` and, as sqrt(1 - threshold), of
            ``on_convergence``.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        scale: Factor on the updates of projected leaves.
        basis: Basis rule; None: ``range_finder(power_iterations=2)``.
        refresh: Refresh rule; None: ``on_convergence`` from 200 to 300 updates, with
            fraction sqrt(1 - threshold).
        rebase: Re-basing rule or its name.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 16))}
        >>> state = adarankgrad(1e-3, rank=4).init(params)
        >>> state[0].subspaces["w"].basis.shape
        (16, 4)

    References:
        Refael et al., `AdaRankGrad <https://arxiv.org/abs/2410.17881>`_, 2024.
        Differences from the paper:

        - Algorithm 1's basis is not ordered; ours is, so that its first columns are the
          ones to keep, and a power iteration sharpens it.
        - Algorithm 2's binary search does not end as printed; a cumulative sum answers.
          The threshold is on squared norms, as in Equation 2.
        - The printed rank is what one gradient asks for, started low. Gradients of
          early pre-training ask for one or two directions and later for many more: that
          rule collapses every layer. Here the rank starts at the capacity, moves both
          ways, is smoothed over refreshes, and has a floor.
        - The second moment's V <- R V of Block 2 can be negative; the ``rebase`` rules
          are not.
        - Block 3 compares the raw norm of one mini-batch's projected gradient; ours is
          smoothed, and the interval is bounded from both sides.
        - The inner counter runs on over refreshes, as printed: bias correction is not
          repeated.
        - Weight decay is not in the paper. Update by layer during backpropagation is
          left to the training loop.
    """
    # energy_rank checks the threshold too, but a rule in rank would go without.
    if isinstance(threshold, (int, float)) and not 0 < threshold < 1:
        raise ValueError(f"threshold must be inside (0, 1), got {threshold}.")
    if refresh is None:
        refresh = on_convergence(fraction=(1 - threshold) ** 0.5)
    rule = as_rank_rule(rank)
    if isinstance(rule, FixedRank):
        rule = energy_rank(rule.capacity, threshold)
    return as_optimizer(
        scale_by_low_rank(
            checked_adam(b1, b2, eps),
            rule,
            basis=range_finder(power_iterations=2) if basis is None else basis,
            refresh=refresh,
            rebase=rebase,
            side=side,
            dimension_numbers=dimension_numbers,
            scale=scale,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    basis: BasisRule | None = None,
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the subspace of the leading singular vectors of a gradient.

    ``scale_by_low_rank`` around ``optax.scale_by_adam`` with an exact SVD of every
    projected leaf each ``update_proj_gap`` updates, on the same update for all, and
    moments kept as they are when the basis changes. Equations, state and cost:
    :func:`scale_by_low_rank`.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns of the bases, >= 1; or a :func:`lowrank_optax.budget` of bytes.
        update_proj_gap: Updates between two SVDs, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        basis: Basis rule; None: ``exact_svd()``. ``range_finder()`` is several times
            faster (``benchmarks/``) and captures nearly as much.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`. Published runs leave embedding
            and head at full size: give None for them, or use ``optax.partition``.
        seed: Seed of a randomized ``basis``.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, with the
        authors' defaults. ``optax.contrib.galore`` projects the long side and has
        ``scale`` 1; ``side="long"``, ``scale=1.0`` reproduce it, on stacked leaves too.
        The first SVD is that of the first gradient, as in the authors' code. A zero or
        non-finite gradient keeps the old basis here and the SVD is repeated at the next
        update.
    """
    return as_optimizer(
        scale_by_low_rank(
            checked_adam(b1, b2, eps),
            rank,
            basis=exact_svd() if basis is None else basis,
            refresh=every(update_proj_gap, stagger=False),
            rebase="keep",
            side=side,
            dimension_numbers=dimension_numbers,
            scale=scale,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


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

    The subspace scheme of the paper: ``scale_by_low_rank`` with a basis that is drawn
    anew every 25 updates and not stored, at granularity c; then decoupled weight decay
    and the learning rate. Equations, state and cost: :func:`scale_by_low_rank`.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1.
        granularity: c, >= 1; the memory of a moment is a * (c r). c = 1 projects whole
            rows, as Flora does; c r = b would be all of the gradient.
        inner: Transformation in the subspace; None: ``optax.scale_by_adam()``.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed one.
        refresh: Refresh rule; None: ``every(25)``; the paper has 20 to 30.
        rebase: How moments follow a new basis: "first", the first moment by the least
            gradient that has its projection, the second kept; "zero" starts anew;
            "keep" is the authors' code. Measured (``RESULTS.md``, c = 4, r = 8): 1.971,
            1.997 and 2.016 nats per byte; 2.106 with P_old^T P_new itself as the
            transfer, which is unbiased and adds noise at each change of basis.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        scale: Factor on the updates of projected leaves.
        seed: Seed of the bases.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        No basis in the state, and moments of 2 columns for each quarter of a row:

        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 16))}
        >>> state = vlorp(1e-3, rank=2, granularity=4).init(params)
        >>> state[0].subspaces["w"].basis, state[0].inner_state.mu["w"].shape
        ((), (256, 2))

    References:
        `VLoRP <https://arxiv.org/abs/2505.01744>`_, 2025, the scheme that it calls SS;
        see :func:`projfactor` for the other one. The momentum follows a new basis here,
        and the basis does not change between the micro-batches of one update.
    """
    return as_optimizer(
        scale_by_low_rank(
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
        ),
        learning_rate,
        weight_decay,
        mask,
    )


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

    :func:`scale_by_projfactor`, then decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1.
        granularity: c, >= 1; see :func:`scale_by_projfactor`.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        basis: See :func:`scale_by_projfactor`.
        refresh: Refresh rule; None: ``every(25)``.
        rebase: How the momentum follows a new basis.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    References:
        `VLoRP and ProjFactor <https://arxiv.org/abs/2505.01744>`_, 2025; differences
        are listed in :func:`scale_by_projfactor`.
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
