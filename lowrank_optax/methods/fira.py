"""Fira: GaLore, and what its projection discards, scaled as Adam scales the rest."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.residual_scaled import scaled_residual
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


def fira(
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
    growth: jax.typing.ArrayLike = 1.01,
    basis: BasisRule | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore, and what its projection discards, scaled as Adam scales the rest.

    :func:`scale_by_fira`, which has equations, state, cost and references, then
    decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_fira`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        growth, basis, dimension_numbers, seed, eps_root, mu_dtype:
            see :func:`scale_by_fira`.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.
    """
    transformation = scale_by_fira(
        rank,
        update_proj_gap,
        scale,
        b1,
        b2,
        eps,
        growth=growth,
        basis=basis,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_fira(
    rank: int | RankRule = 128,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    growth: jax.typing.ArrayLike = 1.01,
    basis: BasisRule | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace, and what that discards, scaled as Adam scales the rest.

    :func:`scale_by_low_rank` around ``optax.scale_by_adam`` with
    :func:`lowrank_optax.scaled_residual`, which has the equations. State: that of
    :func:`scale_by_galore` and one number a matrix. Needs the full gradient at every
    update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        rank: Columns r of the bases, >= 1, or a rule.
        update_proj_gap: Updates between two bases, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        growth: Largest growth of the residual's norm from one update to the next; >= 1.
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.
        eps_root: Added to the second moment, under the root; >= 0.
        mu_dtype: Dtype of the first moment; None: float32 in a subspace, or wider for a
            wider leaf, and the leaf's own at full size.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024. An exact SVD
        finds the basis there; moments follow a new basis here, squares weighted.
    """
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype),
        rank,
        basis=range_finder(power_iterations=1) if basis is None else basis,
        refresh=every(update_proj_gap),
        residual=scaled_residual(growth),
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
