"""SUMO: Muon inside a subspace, with the momentum orthogonalized there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import NumbersByPath
from lowrank_optax.matrix.boxes import is_box
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.shares import is_shared
from lowrank_optax.matrix.view import MatrixView, matrix_view
from lowrank_optax.methods.optimizer import Mask, as_optimizer
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.newton_schulz import orthogonalized, orthogonalized_by_factor
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.residual_orthogonalized import check_orthogonalization
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
        nesterov, ns_steps, rms, basis, refresh, rebase, dimension_numbers, seed:
            see :func:`scale_by_sumo`.

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
    rms: jax.typing.ArrayLike = 0.2,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon inside a subspace, with the momentum orthogonalized there.

    Runs ``optax.contrib.scale_by_muon`` inside :func:`scale_by_low_rank`. For a
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
        ns_steps: Newton-Schulz iterations, >= 1. Five of them bring singular values to
            0.7 ... 1.2.
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
    check_beta(beta)
    check_orthogonalization(ns_steps, rms)

    def muon(numbers):
        return optax.chain(
            _muon(numbers, beta, nesterov, ns_steps),
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


def check_beta(beta: jax.typing.ArrayLike) -> None:
    """Raises ValueError if a decay is out of its range."""
    if isinstance(beta, (int, float)) and not 0 <= beta < 1:
        raise ValueError(f"beta must be inside [0, 1), got {beta}.")


def by_kind(
    matrix: Callable[[NumbersByPath], optax.GradientTransformation],
) -> Callable[[NumbersByPath], optax.GradientTransformation]:
    """Returns a maker of ``matrix`` for (stacks of) matrices and Adam for vectors."""

    def made(numbers: NumbersByPath) -> optax.GradientTransformation:
        def labels(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "vector" if numbers[path] is None else "matrix",
                tree,
                is_leaf=is_box,
            )

        return optax.partition(
            {"matrix": matrix(numbers), "vector": optax.scale_by_adam()}, labels
        )

    return made


def _muon(
    numbers: NumbersByPath,
    beta: jax.typing.ArrayLike,
    nesterov: bool,
    ns_steps: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
    """Returns Muon; on a mesh, Muon's momentum, orthogonalized in shares."""

    def made(**options):
        return optax.contrib.scale_by_muon(
            beta=beta,
            nesterov=nesterov,
            weight_dimension_numbers=functools.partial(_of_muon, numbers),
            **options,
        )

    muon = made(ns_steps=ns_steps)
    # This preconditioning is a part of the first iteration: without one there is none.
    momentum = made(ns_steps=0, preconditioning="aol")

    def orthogonal(path, leaf, coefficients):
        view = _view(path, leaf, numbers)
        matrices, is_exact = view.matrices(leaf), jnp.finfo(leaf.dtype).bits >= 32
        if is_exact and is_shared(leaf, view.stack):
            found = orthogonalized_by_factor(matrices, coefficients, ns_steps)
        else:
            found = orthogonalized(matrices, ns_steps)
        return view.leaf(found)

    def update(updates, state: Any, params=None):
        leaves = jax.tree.leaves_with_path(updates)
        if not any(is_shared(x, _view(path, x, numbers).stack) for path, x in leaves):
            return muon.update(updates, state, params)
        updates, state = momentum.update(updates, state, params)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, leaf: orthogonal(path, leaf, state.ns_coeffs), updates
        )
        return updates, state

    return optax.GradientTransformation(muon.init, update)


def _view(path: tuple, leaf: jax.Array, numbers: NumbersByPath) -> MatrixView:
    axes = numbers[path]
    assert axes is not None
    return matrix_view(leaf.shape, axes, "short", "")


def _of_muon(numbers: NumbersByPath, tree: Any) -> Any:
    """Returns Muon's dimension numbers of a tree."""

    def of_leaf(path, _):
        axes = numbers[path]
        assert axes is not None
        return optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


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
