"""Muon with its momentum in a subspace, and the last gradient outside it."""

import jax
import optax

from lowrank_optax.checks import check_at_least, check_decay
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.methods.optimizer import Mask, as_optimizer, by_kind
from lowrank_optax.neurons import scale_by_neuron
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.newton_schulz import Coefficients
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.residual_orthogonalized import orthogonalized_residual
from lowrank_optax.rules.schedules import RefreshRule, every
from lowrank_optax.transform import scale_by_low_rank


def low_rank_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    residual: jax.typing.ArrayLike = 4.0,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "muon",
    rms: jax.typing.ArrayLike = 0.2,
    neuron_decay: jax.typing.ArrayLike | None = None,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon with its momentum in a subspace, and the last gradient outside it.

    Chains :func:`scale_by_low_rank_muon`, :func:`scale_by_neuron` if asked, decoupled
    weight decay and the learning rate.
    :func:`scale_by_low_rank_muon` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, beta: see :func:`scale_by_low_rank_muon`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        residual, nesterov, ns_steps, ns_coefficients, rms: see
            :func:`scale_by_low_rank_muon`.
        neuron_decay: ``decay`` of :func:`scale_by_neuron`, 0.95 in its paper: a vector
            of state more for each matrix. None: neurons are not scaled.
        basis, refresh, rebase: see :func:`scale_by_low_rank_muon`.
        dimension_numbers, seed: see :func:`scale_by_low_rank_muon`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> state = low_rank_muon(1e-3, rank=4).init({"w": jnp.ones((64, 16))})
        >>> [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        [(16, 4), (64, 4)]
    """
    transformation = scale_by_low_rank_muon(
        rank,
        beta,
        residual=residual,
        nesterov=nesterov,
        ns_steps=ns_steps,
        ns_coefficients=ns_coefficients,
        rms=rms,
        basis=basis,
        refresh=refresh,
        rebase=rebase,
        dimension_numbers=dimension_numbers,
        seed=seed,
    )
    if neuron_decay is not None:
        neurons = scale_by_neuron(neuron_decay, dimension_numbers=dimension_numbers)
        transformation = optax.chain(transformation, neurons)
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_low_rank_muon(
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    *,
    residual: jax.typing.ArrayLike = 4.0,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "muon",
    rms: jax.typing.ArrayLike = 0.2,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with its momentum in a subspace, and the last gradient outside it.

    A gradient matrix G_t (n, m) has the short side b and the long side a. R_t is the
    projection of G_t onto the basis P (b, r). For b = m:

    .. math::
        M_t = \beta M_{t-1} + R_t, \quad N_t = R_t + \beta M_t, \quad
        U_t = 0.2 \sqrt{a} \; \mathrm{orth}(N_t P^\top + \phi (G_t - R_t P^\top))

    with orth(U S V^T) = U V^T and phi = ``residual``. Along the basis, N_t has the
    momentum of many steps. Along other directions the last gradient enters, phi times.
    Both parts are orthogonalized together, so that every direction gets a step of the
    same size. Very small singular values get smaller steps, and phi moves this limit.
    With phi = 1 + beta the method is Muon (Nesterov's) without momentum outside the
    subspace.

    State: as for :func:`scale_by_sumo`, (a + b) r numbers, float32. Cost: Muon's
    orthogonalization at full size, and 4 a b r flops. Every update needs the full
    gradient: subspace gradients are not possible, and ``accumulate`` adds up full
    gradients. Leaves at full size are treated as in :func:`scale_by_sumo`.

    Args:
        rank: Columns r of the bases, >= 1, or a rule.
        beta: Decay of the momentum, in [0, 1).
        residual: Weight phi of the residual G - R P^T, >= 0; a gradient weighs 1 + beta
            inside the subspace. At 0 nothing leaves the subspace, and
            :func:`scale_by_sumo` is cheaper. Losses at 3 to 6 were alike
            (``docs/results.md``).
        nesterov: Whether to add the gradient once more before the orthogonalization.
        ns_steps: Newton-Schulz steps, >= 1. Five of them bring singular values to
            0.7 ... 1.2, and those under 1/500 of the norm to less.
        ns_coefficients: Coefficients of these steps; see :func:`scale_by_sumo`.
        rms: Root mean square of an update of full rank, in [0, 1).
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        refresh: Refresh rule; None: ``every(200)``.
        rebase: Re-basing rule of the momentum, or its name. The default is exact here.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        A transformation; see :func:`scale_by_low_rank`.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If ``residual`` is a rule.

    References:
        A method of this library. The update is that of Jordan, `Muon
        <https://kellerjordan.github.io/posts/muon/>`_, 2024. Refael et al., `SUMO
        <https://arxiv.org/abs/2505.24749>`_, 2025, keep the momentum in the subspace of
        a gradient. Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, add
        the part of the gradient outside the subspace, scaled by row, to Adam's update.
    """
    check_decay("beta", beta)
    if hasattr(residual, "needs_full_gradients"):
        raise TypeError(
            f"residual is a number here, the weight of the part outside, got {residual}"
            "; for other residuals use scale_by_low_rank(optax.trace(0.95), ...)."
        )
    check_at_least("residual", residual, 0)
    return scale_by_low_rank(
        by_kind(lambda numbers: optax.trace(beta, nesterov=nesterov)),
        rank,
        basis=range_finder(power_iterations=1) if basis is None else basis,
        refresh=every(200) if refresh is None else refresh,
        rebase=rebase,
        residual=orthogonalized_residual(residual, ns_steps, rms, ns_coefficients),
        dimension_numbers=dimension_numbers,
        seed=seed,
    )
