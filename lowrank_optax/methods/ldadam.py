"""LDAdam without its error feedback: a subspace that moves at every update."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import range_finder
from lowrank_optax.rules.rebase import ldadam_rebase
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


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
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam without its error feedback: a subspace that moves at every update.

    :func:`scale_by_ldadam`, which has equations, state, cost and references, then
    decoupled weight decay and the learning rate.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank, b1, b2, eps: see :func:`scale_by_ldadam`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        dimension_numbers, seed, eps_root, mu_dtype:
            see :func:`scale_by_ldadam`.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.
    """
    transformation = scale_by_ldadam(
        rank,
        b1,
        b2,
        eps,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_ldadam(
    rank: int = 128,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace that moves at every update, without error feedback.

    :func:`scale_by_low_rank` with a basis by one power iteration from the last one,
    renewed at every update, and :func:`ldadam_rebase`. State and update as for
    :func:`scale_by_galore`; every update pays for a basis, and needs the full gradient.

    Args:
        rank: Columns r of the bases, >= 1.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the first sketches.
        eps_root: Added to the second moment, under the root; >= 0.
        mu_dtype: Dtype of the first moment; None: float32 in a subspace, or wider for a
            wider leaf, and the leaf's own at full size.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024. There the
        power iteration is of the gradient blended with the lifted momentum, and what
        the projection loses is fed back from a buffer at full size, the gradient's.
    """
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype),
        rank,
        basis=range_finder(oversample=0, power_iterations=0.5, warm_start=True),
        refresh=every(1),
        rebase=ldadam_rebase(b1=b1, b2=b2),
        dimension_numbers=dimension_numbers,
        seed=seed,
    )
