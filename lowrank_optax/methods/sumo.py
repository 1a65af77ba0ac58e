"""SUMO: Muon inside a subspace, with the momentum orthogonalized there."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.checks import check_decay
from lowrank_optax.core import NumbersByPath
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.shares import is_shared
from lowrank_optax.matrix.view import MatrixView, matrix_view
from lowrank_optax.methods.optimizer import Mask, as_optimizer, by_kind
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.newton_schulz import (
    Coefficients,
    Triples,
    as_steps,
    coefficients_of,
    orthogonalized,
    orthogonalized_by_factor,
)
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.schedules import RefreshRule, every
from lowrank_optax.transform import scale_by_low_rank


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
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
    """SUMO: Muon inside a subspace, with the momentum orthogonalized there.

    Chains :func:`scale_by_sumo`, decoupled weight decay and the learning rate.
    :func:`scale_by_sumo` documents equations, state, cost and references.

    Args:
        learning_rate: Step size, or a schedule: number of the update -> step size.
        rank, beta: see :func:`scale_by_sumo`.
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Tree of bools, True for each leaf that decays, or a function from the
            parameters to such a tree. None: all leaves decay.
        nesterov, ns_steps, ns_coefficients, rms: see :func:`scale_by_sumo`.
        basis, refresh, rebase, dimension_numbers, seed: see :func:`scale_by_sumo`.

    Returns:
        An optimizer. Its ``update`` needs ``params`` for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> state = sumo(1e-3, rank=4).init({"w": jnp.ones((64, 16))})
        >>> [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        [(16, 4), (64, 4)]
    """
    transformation = scale_by_sumo(
        rank,
        beta,
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
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


def scale_by_sumo(
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    *,
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
    r"""Muon inside a subspace, with the momentum orthogonalized there.

    Runs Muon inside :func:`scale_by_low_rank`, with ``optax.contrib``'s state. For a
    gradient matrix oriented to (a, b), with b its short side, and R_t = G_t P:

    .. math::
        M_t = \beta M_{t-1} + (1 - \beta) R_t, \quad
        U_t = 0.2 \sqrt{a} \; \mathrm{orth}(\hat M_t) P^\top

    with orth(U S V^T) = U V^T. M^ is the momentum after bias correction and Nesterov's
    step. sqrt(a) is sqrt(max(n, m)), so that 0.2 is the root mean square of an update
    of full rank. The state is one moment and the basis: (a + b) r numbers, float32;
    Adam in the subspace has (2 a + b) r, AdamW 2 a b. Matrices at full size get Muon,
    leaves without a matrix get Adam, both with the same learning rate. Embedding and
    head need another optimizer, by ``optax.partition``. Compiled under
    ``jax.set_mesh(mesh)``, each device orthogonalizes its share of a stack of layers,
    and r^2 numbers are gathered for each matrix.

    Args:
        rank: Columns r of the bases, >= 1, or a rule.
        beta: Decay of the momentum, in [0, 1).
        nesterov: Whether to add the gradient once more before the orthogonalization.
        ns_steps: Newton-Schulz steps, >= 1.
        ns_coefficients: Coefficients of the steps, each of which takes X (r, l), r its
            shorter side, to (a I + b G + c G^2) X with G = X X^T, from X / norm(X) on.
            Three numbers (a, b, c), or a sequence of them, one a step, of which the
            last ones count from there on. Or a name; s are singular values over the
            norm of X. "muon": (3.4445, -4.7750, 2.0315); five steps bring s in [0.0021,
            1] to 0.68 ... 1.21, and smaller s to 485 s. "polar_express": six triples of
            the smallest error on [0.001, 1], then (15, -10, 3) / 8; after n = 3, 4, 5,
            6, 7 steps the error of s is under 0.87, 0.56, 0.13, 0.002, 1e-8.
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

    References:
        Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025. The paper
        orthogonalizes by an exact SVD, this code by Newton-Schulz. The paper's limiter
        of the norm's growth and its factor on the update are left out. The paper has no
        Nesterov's step.
    """
    check_decay("beta", beta)
    check_decay("rms", rms)
    steps, coefficients = as_steps(ns_steps), coefficients_of(ns_coefficients)

    def muon(numbers):
        return optax.chain(
            _muon(numbers, beta, nesterov, steps, coefficients),
            optax.stateless(lambda tree, _: _scaled_by_sides(tree, numbers, rms)),
        )

    return scale_by_low_rank(
        by_kind(muon),
        rank,
        basis=range_finder(power_iterations=1) if basis is None else basis,
        refresh=every(200) if refresh is None else refresh,
        rebase=rebase,
        dimension_numbers=dimension_numbers,
        seed=seed,
    )


def _muon(
    numbers: NumbersByPath,
    beta: jax.typing.ArrayLike,
    nesterov: bool,
    ns_steps: jax.typing.ArrayLike,
    coefficients: Triples,
) -> optax.GradientTransformation:
    """Returns Muon with the state of ``optax.contrib``'s; on a mesh, in shares."""
    corrected = optax.tree.bias_correction

    def orthogonal(path, leaf):
        view = _view(path, leaf, numbers)
        is_exact = jnp.finfo(leaf.dtype).bits >= 32
        by_factor = is_exact and is_shared(leaf, view.stack)
        function = orthogonalized_by_factor if by_factor else orthogonalized
        return view.leaf(function(view.matrices(leaf), ns_steps, coefficients))

    def init(params):
        # What is saved has the coefficients too, as optax.contrib's state has.
        table = jnp.asarray(coefficients)
        table = table[0] if len(table) == 1 else table
        zero, mu = jnp.zeros([], jnp.int32), optax.tree.zeros_like(params)
        return optax.contrib.MuonState(count=zero, mu=mu, ns_coeffs=table)

    def update(updates, state: Any, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        if nesterov:
            ahead = corrected(mu, beta, optax.safe_increment(count))
            now = corrected(updates, beta, count)
            mean = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        else:
            mean = corrected(mu, beta, count)
        updates = jax.tree_util.tree_map_with_path(orthogonal, mean)
        return updates, state._replace(count=count, mu=mu)

    return optax.GradientTransformation(init, update)


def _view(path: tuple, leaf: jax.Array, numbers: NumbersByPath) -> MatrixView:
    axes = numbers[path]
    assert axes is not None
    return matrix_view(leaf.shape, axes, "short", "")


def _scaled_by_sides(
    tree: Any, numbers: NumbersByPath, rms: jax.typing.ArrayLike
) -> Any:
    """Returns orthogonal matrices scaled to the root mean square of full rank.

    The kept side is the longer one, and has its full length in the subspace too.
    """

    def scaled(path, leaf):
        view = _view(path, leaf, numbers)
        return leaf * (rms * max(view.rows, view.columns) ** 0.5)

    return jax.tree_util.tree_map_with_path(scaled, tree)
