"""LDAdam without its error feedback: a subspace that moves at every update."""

import jax
import optax

from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, checked_adam
from lowrank_optax.rules.bases import BasisRule
from lowrank_optax.rules.power_iteration import power_iteration
from lowrank_optax.rules.rebase import ldadam_rebase
from lowrank_optax.rules.schedules import every
from lowrank_optax.transform import scale_by_low_rank


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    rho: jax.typing.ArrayLike = 0.908,
    start: BasisRule | None = None,
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
        rho, start, dimension_numbers, seed, eps_root, mu_dtype:
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
        rho=rho,
        start=start,
        dimension_numbers=dimension_numbers,
        seed=seed,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
    )
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_ldadam(
    rank: int = 128,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    rho: jax.typing.ArrayLike = 0.908,
    start: BasisRule | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace that moves at every update, without error feedback.

    :func:`scale_by_low_rank` with :func:`power_iteration
    <lowrank_optax.power_iteration>`, one from the last basis at every update, and
    :func:`ldadam_rebase <lowrank_optax.ldadam_rebase>`. State and update as for
    :func:`scale_by_galore`; every update pays for a basis, and needs the full gradient.

    Args:
        rank: Columns r of the bases, >= 1.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        rho: Weight of the momentum in what the basis follows, in [0, 1); the gradient
            has 1 - rho.
        start: Rule of the first basis; None: ``range_finder(power_iterations=2)``.
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
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, with the
        decays and the rho of the authors' code. Differences from that code with its
        ``error_feedback=False`` (``benchmarks/parity.py``: relative norm of the
        difference of two updates, mean and most of 60 updates of noisy gradients):

        - The first basis comes from a range finder, theirs from an exact SVD: 0.024,
          0.28 at most. With ``start=exact_svd()`` 8e-5, 0.008 at most, where a second
          moment passes zero.
        - A square matrix has its columns projected here, and its rows there.
        - A zero or non-finite gradient keeps the basis here.

        Their error feedback is not here: what the projection loses is added to the next
        gradient, from a buffer at full size; PyTorch's own buffer of the gradient
        serves there, and JAX has none. Updates with it are 0.37 apart.
    """
    return scale_by_low_rank(
        checked_adam(b1, b2, eps, eps_root, mu_dtype),
        rank,
        basis=power_iteration(rho, b1, start),
        refresh=every(1),
        rebase=ldadam_rebase(b1=b1, b2=b2),
        dimension_numbers=dimension_numbers,
        seed=seed,
    )
