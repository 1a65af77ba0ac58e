"""Fira: GaLore, and what its projection discards, scaled as Adam scales the rest."""

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
    """Fira: GaLore, and what its projection discards, scaled as Adam scales the rest.

    :func:`scale_by_fira`, which has equations, state, cost and references, then
    decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_fira`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        growth, taken, corrected, basis, rebase: see :func:`scale_by_fira`.
        dimension_numbers, seed, eps_root, raw_eps, mu_dtype: see :func:`scale_by_fira`.

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
    r"""Adam in a subspace, and what that discards, scaled as Adam scales the rest.

    :func:`scale_by_low_rank` around ``optax.scale_by_adam`` with

    .. math::
        U = \alpha N P^\top + \mathrm{limited}(\phi (G - \alpha R P^\top)), \quad
        \phi_i = \|N_i\| / \|R_i\|

    for each row i of the kept side; :func:`lowrank_optax.scaled_residual` has the
    limiter. alpha is ``scale``: it makes what goes on inside the subspace smaller, and
    not the rest. State: that of :func:`scale_by_galore` and one number a matrix. Needs
    the full gradient at every update: no subspace gradients, and ``accumulate`` adds up
    full ones.

    Args:
        rank: Columns r of the bases, >= 1, or a rule.
        update_proj_gap: Updates between two bases, >= 1.
        scale: alpha, the factor on the part inside the subspace. 0.25 in the authors'
            pre-training, 1 in their fine-tuning.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        growth: Largest growth of the residual's norm from one update to the next; >= 1.
        taken: Share of R P^T that is taken off the gradient. None: alpha, as in the
            authors' code; 1: all of it, as in the paper.
        corrected: Whether the limiter compares norms with Adam's bias corrections in
            them. In the authors' code these come after it.
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        rebase: How moments follow a new basis, a rule or its name; "keep": not at all,
            as in the paper and the code.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.
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
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024. Its residual is
        G - R P^T; the authors' code, whose results it reports, takes alpha R P^T off.
        That is the default here: at alpha = 0.25 the updates of ``taken=1`` are 0.7
        apart, and it ended 0.7 % above in training (``RESULTS.md``). Differences from
        the code (``benchmarks/parity.py``: relative norm of the difference of two
        updates, mean of 60 updates of noisy gradients):

        - An exact SVD finds the basis there, for all leaves on the same update, and a
          range finder here, the leaves spread over the gap: 0.2. With
          ``basis=exact_svd()`` 0.12, all of it after the second basis: the moments that
          are kept depend on the signs of singular vectors, which are arbitrary. With
          the authors' bases 7e-5.
        - eps is added after the bias correction here: see ``raw_eps``. Beside gradients
          with entries of 1e-3 that is 0.04, of 1e-5 above 1; with ``raw_eps`` 1e-5.
        - 1e-8 is added there to every norm that divides. After an update with a zero
          gradient the limiter there starts from 1e-8; here the next update is free.
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
