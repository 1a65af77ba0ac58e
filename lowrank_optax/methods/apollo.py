"""APOLLO: the gradient itself, each channel scaled as Adam scales its projection."""

import jax
import optax

from lowrank_optax.checks import check_at_least
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.random_bases import RandomBasis, gaussian
from lowrank_optax.rules.residual_scaled import ScaledGradient
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    by_matrix: bool = False,
    growth: jax.typing.ArrayLike = 1.01,
    corrected: bool = False,
    basis: BasisRule | RandomBasis | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient itself, each channel scaled as Adam scales its projection.

    Chains :func:`scale_by_apollo`, decoupled weight decay and the learning rate.
    :func:`scale_by_apollo` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_apollo`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        by_matrix, growth, corrected, basis: see :func:`scale_by_apollo`.
        dimension_numbers, seed: see :func:`scale_by_apollo`.
        eps_root, raw_eps, mu_dtype: see :func:`scale_by_apollo`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

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
        corrected=corrected,
        basis=basis,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        raw_eps=raw_eps,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_apollo(
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    by_matrix: bool = False,
    growth: jax.typing.ArrayLike = 1.01,
    corrected: bool = False,
    basis: BasisRule | RandomBasis | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient itself, each channel scaled as Adam scales its projection.

    P is random and not stored, R = G P, and N is Adam's update of R. For each row i of
    the kept side:

    .. math::
        U = \mathrm{scale} \; \mathrm{limited}(\phi G), \quad
        \phi_i = \|N_i\| / \|R_i\|

    :func:`lowrank_optax.scaled_residual` defines limited. State: 2 a r + 1 numbers a
    matrix, float32. Every update needs the full gradient: subspace gradients are not
    possible, and ``accumulate`` adds up full gradients.

    Args:
        rank: Columns r of the bases, >= 1. APOLLO-Mini is ``rank=1``,
            ``by_matrix=True``, ``scale=128**0.5``.
        update_proj_gap: Updates between two draws, >= 1.
        scale: Factor on the updates of projected leaves, the paper's alpha. The
            authors' code has alpha squared under this name.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        by_matrix: Whether a matrix has a single phi instead of one for each row.
        growth: Largest factor between the norms of two successive updates; >= 1.
        corrected: Whether the limiter compares norms after Adam's bias corrections. The
            authors' code limits before these corrections.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed basis.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.
        eps_root: Added to the second moment, under the root; >= 0.
        raw_eps: Whether to add eps before the bias correction of the second moment, as
            the authors' code does. eps then counts as eps / sqrt(1 - b2^t).
        mu_dtype: Dtype of the first moment. None: in a subspace float32, or wider for a
            wider leaf; at full size the dtype of the leaf.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024. Differences from
        the authors' code (``benchmarks/parity.py``: relative norm of the difference of
        two updates, mean of 60 updates of noisy gradients):

        - The authors' ``scale`` is alpha squared; ``scale`` here is alpha, as in the
          paper. Their ``scale_front`` applies the scale before the limiter. The order
          does not matter: both norms in the limiter have the same constant factor.
        - The random numbers differ, and each leaf draws at updates of its own.
          Difference: 0.3; with the authors' projections 1e-4.
        - eps is added after the bias correction here. Difference: 0.03 for gradient
          entries of 1e-3, above 1 for entries of 1e-5; with ``raw_eps=True`` 1e-5.
        - The authors add 1e-8 to every norm in a denominator. After a zero gradient
          their limiter starts from 1e-8; here the next update is not limited.
    """
    check_at_least("growth", growth, 1)
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype, raw_eps),
        rank,
        basis=gaussian() if basis is None else basis,
        refresh=every(update_proj_gap),
        # Only norms are used, and those in another random subspace are alike.
        rebase="keep",
        residual=ScaledGradient(growth, None if corrected else (b1, b2), by_matrix),
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
