"""APOLLO: the gradient itself, each channel scaled as Adam scales its projection."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.random_bases import RandomBasis, gaussian
from lowrank_optax.rules.residual_scaled import Scaled, check_growth
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


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
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient itself, each channel scaled as Adam scales its projection.

    :func:`scale_by_apollo`, which has equations, state, cost and references, then
    decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_apollo`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        by_matrix, growth, basis, dimension_numbers, seed, eps_root, mu_dtype:
            see :func:`scale_by_apollo`.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.
    """
    transformation = scale_by_apollo(
        rank,
        update_proj_gap,
        scale,
        b1,
        b2,
        eps,
        by_matrix=by_matrix,
        growth=growth,
        basis=basis,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_apollo(
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    by_matrix: bool = False,
    growth: jax.typing.ArrayLike = 1.01,
    basis: BasisRule | RandomBasis | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient itself, each channel scaled as Adam scales its projection.

    With R = G P for a random P that is not stored, and N what Adam makes of it, for
    each row i of the kept side

    .. math::
        U = \mathrm{scale} \; \mathrm{limited}(\phi G), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited as in :func:`lowrank_optax.scaled_residual`. State: 2 a r numbers
    and one a matrix, float32. Needs the full gradient at every update: no subspace
    gradients, and ``accumulate`` adds up full ones.

    Args:
        rank: Columns r of the bases, >= 1; 1 with ``by_matrix`` for APOLLO-Mini, whose
            ``scale`` is 128 ** 0.5.
        update_proj_gap: Updates between two draws, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        by_matrix: Whether a matrix has one phi and not one for each row.
        growth: Largest growth of the update's norm from one update to the next; >= 1.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed one.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.
        eps_root: Added to the second moment, under the root; >= 0.
        mu_dtype: Dtype of the first moment; None: float32 in a subspace, or wider for a
            wider leaf, and the leaf's own at full size.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
    """
    check_growth(growth)
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype),
        rank,
        basis=gaussian() if basis is None else basis,
        refresh=every(update_proj_gap),
        # Norms are all that is used: those of another random subspace are alike.
        rebase="keep",
        residual=Scaled(growth, by_matrix, whole=True),
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
