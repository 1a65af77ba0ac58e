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

    :func:`scale_by_apollo`, which has equations, state, cost and references, then
    decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_apollo`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        by_matrix, growth, corrected, basis: see :func:`scale_by_apollo`.
        dimension_numbers, seed: see :func:`scale_by_apollo`.
        eps_root, raw_eps, mu_dtype: see :func:`scale_by_apollo`.

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
        scale: Factor on the updates of projected leaves, the paper's alpha; the root of
            the authors' ``scale``.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        by_matrix: Whether a matrix has one phi and not one for each row.
        growth: Largest growth of the update's norm from one update to the next; >= 1.
        corrected: Whether the limiter compares norms with Adam's bias corrections in
            them. In the authors' code these come after it.
        basis: ``gaussian()`` (None), ``rademacher()``, or a computed one.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the bases.
        eps_root: Added to the second moment, under the root; >= 0.
        raw_eps: Whether eps is added before the second moment's bias is corrected, as
            in the authors' code, where it counts as eps / sqrt(1 - b2^t).
        mu_dtype: Dtype of the first moment; None: float32 in a subspace, or wider for a
            wider leaf, and the leaf's own at full size.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024. Differences from
        the authors' code (``benchmarks/parity.py``: relative norm of the difference of
        two updates, mean of 60 updates of noisy gradients):

        - Its ``scale`` is the square of alpha; ``scale`` here is alpha, as in the
          paper. ``scale_front`` there says whether the limiter comes after it, which
          makes no difference: a constant factor is in both norms that it compares.
        - Random numbers are others, and leaves draw anew at updates of their own: 0.3.
          With the authors' projections 1e-4.
        - eps is added after the bias correction here: see ``raw_eps``. Beside gradients
          with entries of 1e-3 that is 0.03, of 1e-5 above 1; with ``raw_eps`` 1e-5.
        - 1e-8 is added there to every norm that divides. After an update with a zero
          gradient the limiter there starts from 1e-8; here the next update is free.
    """
    check_growth(growth)
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype, raw_eps),
        rank,
        basis=gaussian() if basis is None else basis,
        refresh=every(update_proj_gap),
        # Norms are all that is used: those of another random subspace are alike.
        rebase="keep",
        residual=Scaled(
            growth,
            decays=None if corrected else (b1, b2),
            by_matrix=by_matrix,
            whole=True,
        ),
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
