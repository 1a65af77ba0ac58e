"""GaLore: Adam in the subspace of the leading singular vectors of a gradient."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.view import Side
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule, exact_svd
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


def galore(
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
    basis: BasisRule | None = None,
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the subspace of the leading singular vectors of a gradient.

    Chains :func:`scale_by_galore`, decoupled weight decay and the learning rate.
    :func:`scale_by_galore` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, update_proj_gap, scale, b1, b2, eps: see :func:`scale_by_galore`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        basis, side, dimension_numbers, seed, eps_root, raw_eps, mu_dtype:
            see :func:`scale_by_galore`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.
    """
    transformation = scale_by_galore(
        rank,
        update_proj_gap,
        scale,
        b1,
        b2,
        eps,
        basis=basis,
        side=side,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        raw_eps=raw_eps,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_galore(
    rank: int | RankRule = 128,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    basis: BasisRule | None = None,
    side: Side = "short",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    raw_eps: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in the subspace of the leading singular vectors of a gradient.

    Runs ``optax.scale_by_adam`` inside :func:`scale_by_low_rank`, which documents
    equations, state and cost. An exact SVD computes the bases of all projected leaves
    on the same update, every ``update_proj_gap`` updates. The moments stay as they are
    when the basis changes.

    Args:
        rank: Columns of the bases, >= 1; or a :func:`lowrank_optax.budget` of bytes.
        update_proj_gap: Updates between two SVDs, >= 1.
        scale: Factor on the updates of projected leaves.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        basis: Basis rule; None: ``exact_svd()``. ``range_finder()`` is several times
            faster (``benchmarks/``) and captures nearly as much.
        side: "short" or "long"; see :func:`scale_by_low_rank`.
        dimension_numbers: See :func:`scale_by_low_rank`. Published runs leave embedding
            and head at full size: give these leaves None, or use ``optax.partition``.
        seed: Seed of a randomized ``basis``.
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
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, with the
        authors' defaults. ``optax.contrib.galore`` projects the long side and has
        ``scale`` 1: ``side="long"``, ``scale=1.0``, ``eps=1e-8`` give the same updates.
        It does not project stacks of matrices.

        The first SVD is of the first gradient, as in the authors' code. A zero or
        non-finite gradient keeps the old basis here. The SVD is then tried again at
        later updates, see :func:`lowrank_optax.every`. Differences from the authors'
        code (``benchmarks/parity.py``: relative norm of the difference of two updates,
        mean of 60 updates of noisy gradients):

        - The signs of singular vectors are arbitrary, and kept moments depend on them.
          Difference: 0.25, from the second basis on; with the authors' bases 2e-5.
        - eps is added after the bias correction here, as in the paper. Difference: 0.01
          for gradient entries of 1e-3, 0.5 for entries of 1e-5; with ``raw_eps=True``
          1e-5.
    """
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype, raw_eps),
        rank,
        basis=exact_svd() if basis is None else basis,
        refresh=every(update_proj_gap, stagger=False),
        rebase="keep",
        side=side,
        dimension_numbers=dimension_numbers,
        scale=scale,
        seed=seed,
    )
