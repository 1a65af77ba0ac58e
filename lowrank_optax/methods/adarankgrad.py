"""AdaRankGrad: Adam in a subspace whose rank and moment of renewal adapt."""

import jax
import optax

from lowrank_optax.checks import check_share
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.view import Side
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.ranks import FixedRank, RankRule, as_rank_rule, energy_rank
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.residual import ResidualRule
from lowrank_optax.rules.schedules import RefreshRule, on_convergence
from lowrank_optax.transform import scale_by_low_rank


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
    residual: ResidualRule | None = None,
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad: Adam in a subspace whose rank and moment of renewal adapt.

    Chains :func:`scale_by_adarankgrad`, decoupled weight decay and the learning rate.
    :func:`scale_by_adarankgrad` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, threshold, b1, b2, eps: see :func:`scale_by_adarankgrad`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        scale, basis, refresh, rebase, residual: see :func:`scale_by_adarankgrad`.
        side, dimension_numbers, seed: see :func:`scale_by_adarankgrad`.
        eps_root, mu_dtype: see :func:`scale_by_adarankgrad`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 16))}
        >>> state = adarankgrad(1e-3, rank=4).init(params)
        >>> state[0].subspaces["w"].basis.shape
        (16, 4)
    """
    transformation = scale_by_adarankgrad(
        rank,
        threshold,
        b1,
        b2,
        eps,
        scale=scale,
        basis=basis,
        refresh=refresh,
        rebase=rebase,
        residual=residual,
        side=side,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_adarankgrad(
    rank: int | RankRule = 128,
    threshold: jax.typing.ArrayLike = 0.0003,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    residual: ResidualRule | None = None,
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace whose rank and moment of renewal adapt.

    Runs ``optax.scale_by_adam`` inside :func:`scale_by_low_rank`, which documents
    equations, state and cost. The rank follows the gradient's energy, the basis is
    randomized and renewed on convergence, and the moments are re-based.

    Args:
        rank: Capacity, the largest rank, >= 1. The least rank is seven eighths of the
            capacity, because lower ranks cost loss (``docs/results.md``). Or a rank
            rule with a threshold of its own: with ``energy_rank(128, 0.05,
            min_rank=4)`` ranks fall as in the paper, and :func:`compact
            <lowrank_optax.compact>` can free bytes. Or a :func:`lowrank_optax.budget`
            of bytes, whose ranks stay.
        threshold: Share of a gradient's squared norm that the subspace may lose; in
            (0, 1). ``energy_rank`` gets this share if ``rank`` is an int, and
            ``on_convergence`` the fraction sqrt(1 - threshold) in any case.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        scale: Factor on the updates of projected leaves.
        basis: Basis rule; None: ``range_finder(power_iterations=2)``.
        refresh: Refresh rule; None: ``on_convergence`` from 200 to 300 updates, with
            fraction sqrt(1 - threshold).
        rebase: Re-basing rule or its name.
        residual: Rule for the part of the gradient outside the subspace; None: it is
            dropped, as in the paper. With :func:`sign_residual
            <lowrank_optax.sign_residual>` a rank that fell to a half cost 0.1 % of the
            loss (``docs/results.md``); every update then needs the full gradient.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.
        eps_root: Added to the second moment, under the root; >= 0.
        mu_dtype: Dtype of the first moment. None: in a subspace float32, or wider for a
            wider leaf; at full size the dtype of the leaf.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Refael et al., `AdaRankGrad <https://arxiv.org/abs/2410.17881>`_, 2024.
        Differences from the paper:

        - Algorithm 1 does not order the basis. Here the columns are ordered by energy,
          so that the first ones are kept, and power iterations sharpen the basis.
        - Algorithm 2's binary search does not end as printed; a cumulative sum takes
          its place. The threshold is on squared norms, as in Equation 2.
        - The paper's rank is the demand of one gradient, and starts low. Gradients of
          early pre-training demand one or two directions, later gradients many more, so
          the paper's rule collapses every layer. Here the rank starts at the capacity,
          rises and falls, is smoothed over refreshes, and has a floor.
        - Block 2's V <- R V can make a second moment negative; no ``rebase`` rule can.
        - Block 3 compares the raw norm of one mini-batch's projected gradient. Here the
          norm is smoothed, and the interval has a lower and an upper bound.
        - Adam's counter runs on over refreshes, as printed: the bias correction is not
          repeated.
        - Updating layer by layer during backpropagation is left to the training loop.
    """
    # energy_rank checks the threshold too, but not where ``rank`` is a rule.
    check_share("threshold", threshold)
    if refresh is None:
        refresh = on_convergence(fraction=(1 - threshold) ** 0.5)
    rule = as_rank_rule(rank)
    if isinstance(rule, FixedRank):
        rule = energy_rank(rule.capacity, threshold)
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype),
        rule,
        basis=range_finder(power_iterations=2) if basis is None else basis,
        refresh=refresh,
        rebase=rebase,
        residual=residual,
        side=side,
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
