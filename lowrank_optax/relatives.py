"""Methods of other papers, as compositions of the same parts, from their papers."""

from typing import Any

import jax
import optax

from lowrank_optax.alias import Mask, as_optimizer, checked_adam
from lowrank_optax.bases import BasisRule, range_finder
from lowrank_optax.channels import ChannelScaled
from lowrank_optax.low_rank import (
    InsideSubspace,
    low_rank_transformation,
    make_parts,
    scale_by_low_rank,
)
from lowrank_optax.matrices import DimensionNumbers
from lowrank_optax.random_bases import RandomBasis, gaussian
from lowrank_optax.ranks import RankRule
from lowrank_optax.rebase import ldadam_rebase
from lowrank_optax.refresh import every


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam without its error feedback: Adam in a subspace that moves at every update.

    ``scale_by_low_rank`` with a basis by one power iteration from the last one, renewed
    at every update, and :func:`ldadam_rebase`. State and update as for :func:`galore`;
    every update pays for a basis, and needs the full gradient.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the first sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024. There the
        power iteration is of the gradient blended with the lifted momentum, and what
        the projection loses is fed back from a buffer at full size, the gradient's.
    """
    return as_optimizer(
        scale_by_low_rank(
            checked_adam(b1, b2, eps),
            rank,
            basis=range_finder(oversample=0, power_iterations=0.5, warm_start=True),
            refresh=every(1),
            rebase=ldadam_rebase(b2),
            dimension_numbers=dimension_numbers,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


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
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: GaLore, and what its projection discards, scaled as Adam scales the rest.

    With R = G P and N what Adam makes of it, for each row i of the kept side

    .. math::
        U = \mathrm{scale} \, (N P^\top + \mathrm{limited}(\phi (G - R P^\top))), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited(S) shrinks S to ``growth`` times the norm that it had at the update before,
    where it is longer. State: that of :func:`galore` and one number a matrix. Needs
    the full gradient at every update: no subspace gradients, and ``accumulate`` adds up
    full ones.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1, or a rule.
        update_proj_gap: Updates between two bases, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        growth: Largest growth of the residual's norm from one update to the next; >= 1.
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024. An exact SVD
        finds the basis there; moments follow a new basis here, squares weighted.
    """
    return _channel_scaled(
        checked_adam(b1, b2, eps),
        growth=growth,
        keeps_subspace=True,
        by_matrix=False,
        scale=scale,
        parts={
            "rank": rank,
            "basis": range_finder(power_iterations=1) if basis is None else basis,
            "refresh": every(update_proj_gap),
            "rebase": "square",
            "dimension_numbers": dimension_numbers,
            "seed": seed,
        },
        end=(learning_rate, weight_decay, mask),
    )


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    by_matrix: bool = False,
    growth: jax.typing.ArrayLike = 1.01,
    basis: BasisRule | RandomBasis | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: the gradient itself, each channel scaled as Adam scales its projection.

    With R = G P for a random P that is not stored, and N what Adam makes of it, for
    each row i of the kept side

    .. math::
        U = \mathrm{scale} \; \mathrm{limited}(\phi G), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited as in :func:`fira`. State: 2 a r numbers and one a matrix, float32. Needs
    the full gradient at every update: no subspace gradients, and ``accumulate`` adds up
    full ones.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1; 1 with ``by_matrix`` for APOLLO-Mini, whose
            ``scale`` is 128 ** 0.5.
        update_proj_gap: Updates between two draws, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        by_matrix: Whether a matrix has one phi and not one for each row.
        growth: Largest growth of the update's norm from one update to the next; >= 1.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed one.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
    """
    return _channel_scaled(
        checked_adam(b1, b2, eps),
        growth=growth,
        keeps_subspace=False,
        by_matrix=by_matrix,
        scale=scale,
        parts={
            "rank": rank,
            "basis": gaussian() if basis is None else basis,
            "refresh": every(update_proj_gap),
            # Norms are all that is used: those of another random subspace are alike.
            "rebase": "keep",
            "dimension_numbers": dimension_numbers,
            "seed": seed,
        },
        end=(learning_rate, weight_decay, mask),
    )


def _channel_scaled(
    inner, *, growth, keeps_subspace, by_matrix, scale, parts, end: tuple[Any, Any, Any]
) -> optax.GradientTransformationExtraArgs:
    if isinstance(growth, (int, float)) and growth < 1:
        raise ValueError(f"growth must be >= 1, got {growth}.")
    inside = InsideSubspace(optax.with_extra_args_support(inner), scale)
    core = ChannelScaled(inside, keeps_subspace, by_matrix, growth)
    made = make_parts(
        side="short",
        granularity=1,
        moments={"norms": "constant"},
        needs_full_gradients=True,
        **parts,
    )
    return as_optimizer(low_rank_transformation(core, made), *end)
