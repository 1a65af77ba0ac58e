"""Fira: GaLore, plus the discarded part of the gradient, scaled as Adam scales."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.rebase import RebaseRule
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
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    growth: jax.typing.ArrayLike = 1.01,
    taken: jax.typing.ArrayLike | None = None,
    corrected: bool = False,
    basis: BasisRule | None = None,
    rebase: str | RebaseRule = "keep",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore, plus the discarded part of the gradient, scaled as Adam scales.

    Chains :func:`scale_by_fira`, decoupled weight decay and the learning rate.
    :func:`scale_by_fira` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_fira`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        growth, taken, corrected, basis, rebase: see :func:`scale_by_fira`.
        dimension_numbers, seed, eps_root, raw_eps, mu_dtype: see :func:`scale_by_fira`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

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
        taken=taken,
        corrected=corrected,
        basis=basis,
        rebase=rebase,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        raw_eps=raw_eps,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_fira(
    rank: int | RankRule = 128,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    growth: jax.typing.ArrayLike = 1.01,
    taken: jax.typing.ArrayLike | None = None,
    corrected: bool = False,
    basis: BasisRule | None = None,
    rebase: str | RebaseRule = "keep",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace, plus the rest of the gradient, scaled as Adam scales.

    Runs ``optax.scale_by_adam`` inside :func:`scale_by_low_rank`. With R = G P, Adam's
    update N of R, and each row i of the kept side:

    .. math::
        U = \alpha N P^\top + \mathrm{limited}(\phi (G - \alpha R P^\top)), \quad
        \phi_i = \|N_i\| / \|R_i\|

    :func:`lowrank_optax.scaled_residual` defines limited. alpha is ``scale``: what it
    takes from the part inside the subspace, the other part has. State: as for
    :func:`scale_by_galore`, plus one number a matrix. Every update needs the full
    gradient: subspace gradients are not possible, and ``accumulate`` adds up full
    gradients.

    Args:
        rank: Columns r of the bases, >= 1, or a rule.
        update_proj_gap: Updates between two bases, >= 1.
        scale: alpha, the factor on the part inside the subspace. The authors take 0.25
            for pre-training and 1 for fine-tuning.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        growth: Largest factor between the residual's norms at two successive updates;
            >= 1.
        taken: Share of R P^T that is subtracted from the gradient. None: alpha, as in
            the authors' code; 1 is the paper's choice.
        corrected: Whether the limiter compares norms after Adam's bias corrections. The
            authors' code limits before these corrections.
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        rebase: Re-basing rule of the moments, or its name. "keep" leaves the moments as
            they are, as the paper and the authors' code do.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.
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
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024. The paper's
        residual is G - R P^T. The authors' code, which made the paper's results, has
        G - alpha R P^T, the default here. At alpha = 0.25 the updates of ``taken=1``
        differ by 0.7, and the loss ended 0.7 % higher (``docs/results.md``).
        Differences from the code (``benchmarks/parity.py``: relative norm of the
        difference of two updates, mean of 60 updates of noisy gradients):

        - The authors compute all bases on the same update, by an exact SVD. Here a
          range finder does, and the leaves are spread over the gap. Difference: 0.2;
          with ``basis=exact_svd()`` 0.12, from the second basis on, because kept
          moments depend on the arbitrary signs of singular vectors; with the authors'
          bases 7e-5.
        - eps is added after the bias correction here. Difference: 0.04 for gradient
          entries of 1e-3, above 1 for entries of 1e-5; with ``raw_eps=True`` 1e-5.
        - The authors add 1e-8 to every norm in a denominator. After a zero gradient
          their limiter starts from 1e-8; here the next update is not limited.
    """
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype, raw_eps),
        rank,
        basis=range_finder(power_iterations=1) if basis is None else basis,
        refresh=every(update_proj_gap),
        rebase=rebase,
        residual=scaled_residual(
            growth,
            inside=scale,
            taken=scale if taken is None else taken,
            decays=None if corrected else (b1, b2),
        ),
        dimension_numbers=dimension_numbers,
        seed=seed,
    )
