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

    Chains :func:`scale_by_ldadam`, decoupled weight decay and the learning rate.
    :func:`scale_by_ldadam` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, b1, b2, eps: see :func:`scale_by_ldadam`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        rho, start, dimension_numbers, seed, eps_root, mu_dtype:
            see :func:`scale_by_ldadam`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

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

    Runs ``optax.scale_by_adam`` inside :func:`scale_by_low_rank`. At every update one
    :func:`power_iteration <lowrank_optax.power_iteration>` turns the last basis into
    the next, and :func:`ldadam_rebase <lowrank_optax.ldadam_rebase>` moves the moments.
    State and update are those of :func:`scale_by_galore`. Every update computes a
    basis, and needs the full gradient.

    Args:
        rank: Columns r of the bases, >= 1.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        rho: Weight of the momentum in the matrix that the basis follows, in [0, 1). The
            gradient has the weight 1 - rho.
        start: Rule of the first basis; None: ``range_finder(power_iterations=2)``.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the first sketches.
        eps_root: Added to the second moment, under the root; >= 0.
        mu_dtype: Dtype of the first moment. None: in a subspace float32, or wider for a
            wider leaf; at full size the dtype of the leaf.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, with the
        decays and the rho of the authors' code. Differences from this code with
        ``error_feedback=False`` (``benchmarks/parity.py``: relative norm of the
        difference of two updates, mean and maximum over 60 updates of noisy gradients):

        - The first basis comes from a range finder here, from an exact SVD there.
          Difference: 0.024, at most 0.28; with ``start=exact_svd()`` 8e-5, at most
          0.008, where a second moment passes zero.
        - A square matrix has its columns projected here, and its rows there.
        - A zero or non-finite gradient keeps the basis here.

        The authors' error feedback is left out. It adds the lost part of a gradient to
        the next gradient, from a buffer at full size. PyTorch's gradient buffer serves
        as this buffer; JAX has no such buffer. Updates with error feedback differ from
        these by 0.37.
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
