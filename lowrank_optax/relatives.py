"""Methods of other papers, as compositions of the same parts, from their papers."""

import functools
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
from lowrank_optax.rebase import RebaseRule, ldadam_rebase
from lowrank_optax.refresh import RefreshRule, every


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms: jax.typing.ArrayLike = 0.2,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SUMO: Muon inside a subspace, the momentum orthogonalized there.

    ``scale_by_low_rank`` around ``optax.contrib.scale_by_muon``. For a gradient matrix
    oriented to (a, b), b its short side, and R_t = G_t P:

    .. math::
        M_t = \beta M_{t-1} + (1 - \beta) R_t, \quad
        U_t = 0.2 \sqrt{a} \; \mathrm{orth}(\hat M_t) P^\top

    with orth(U S V^T) = U V^T and M^ the momentum with its bias corrected, and with
    Nesterov's step. sqrt(a) is sqrt(max(n, m)), so that 0.2 is the root mean square of
    an update of full rank. One moment and the basis: (a + b) r numbers, float32, where
    Adam in the subspace has (2 a + b) r and AdamW 2 a b. Matrices at full size have
    Muon; vectors have Adam with the same learning rate. As for Muon, embedding and head
    want another optimizer: ``optax.partition``.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1, or a rule.
        beta: Decay of the momentum, in [0, 1).
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        nesterov: Whether the gradient counts once more in what is orthogonalized.
        ns_steps: Newton-Schulz iterations, >= 1; singular values come to 0.7 ... 1.2
            in 5.
        rms: Root mean square of an update of full rank, in [0, 1).
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        refresh: Refresh rule; None: ``every(200)``.
        rebase: Re-basing rule or its name; of the momentum, which follows exactly.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> state = sumo(1e-3, rank=4).init({"w": jnp.ones((64, 16))})
        >>> [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        [(16, 4), (64, 4)]

    References:
        Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025. An exact SVD
        orthogonalizes there, Newton-Schulz here; the norm-growth limiter and its
        factor on the update are not here; Nesterov's step is not there.
    """
    for name, value in (("beta", beta), ("rms", rms)):
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{name} must be inside [0, 1), got {value}.")
    if ns_steps < 1:
        raise ValueError(f"ns_steps must be >= 1, got {ns_steps}.")
    # One transformation for each kind of leaf: Muon's own takes matrices only.
    inner = optax.partition(
        {
            "matrix": optax.chain(
                optax.contrib.scale_by_muon(
                    beta=beta,
                    nesterov=nesterov,
                    ns_steps=ns_steps,
                    weight_dimension_numbers=_last_two_axes,
                ),
                optax.stateless(lambda tree, _: _scaled_by_side(tree, rms)),
            ),
            "vector": optax.scale_by_adam(),
        },
        functools.partial(
            jax.tree.map, lambda leaf: "matrix" if leaf.ndim > 1 else "vector"
        ),
    )
    return as_optimizer(
        scale_by_low_rank(
            inner,
            rank,
            basis=range_finder(power_iterations=1) if basis is None else basis,
            refresh=every(200) if refresh is None else refresh,
            rebase=rebase,
            dimension_numbers=dimension_numbers,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def _last_two_axes(tree: Any) -> Any:
    """Returns Muon's dimension numbers of stacks of matrices."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda leaf: numbers, tree)


def _scaled_by_side(tree: Any, rms: jax.typing.ArrayLike) -> Any:
    """Returns orthogonal matrices scaled to the root mean square of full rank.

    The kept side, the longer one, is there in the subspace too.
    """
    return jax.tree.map(lambda x: x * (rms * max(x.shape[-2:]) ** 0.5), tree)


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
