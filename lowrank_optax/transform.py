"""``scale_by_low_rank``: any Optax transformation, run inside a low-rank subspace.

Every method of this library is a choice of parts around an inner transformation:

=============  ===============  =========  ==============  =======  ==============
method         basis            rank       refresh         rebase   residual
=============  ===============  =========  ==============  =======  ==============
GaLore         exact_svd        fixed      every(200)      keep     dropped
AdaRankGrad    range_finder     by energy  on_convergence  square   dropped
VLoRP          random           fixed      every(25)       first    dropped
LDAdam         power_iteration  fixed      every(1)        ldadam   dropped
Fira           range_finder     fixed      every(200)      keep     scaled
SUMO           range_finder     fixed      every(200)      square   dropped
low_rank_muon  range_finder     fixed      every(200)      square   orthogonalized
=============  ===============  =========  ==============  =======  ==============

The inner transformation is Adam; for SUMO it is Muon, for low_rank_muon a momentum.
APOLLO scales the gradient itself. ProjFactor has its second moment at full size, and so
a core of its own.

An update projects, runs the core and lifts. :mod:`lowrank_optax.renewal` renews bases.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.moments import locate_moments
from lowrank_optax.binding.states import (
    as_given,
    low_rank_record,
    slots_of,
    with_slots,
)
from lowrank_optax.codes import decoded_tree, encoded_tree
from lowrank_optax.core import Core, InLeaf, Inner, InsideSubspace
from lowrank_optax.initial import initial_state
from lowrank_optax.kinds import Kind
from lowrank_optax.matrix.arrays import as_arrays, leaf_name
from lowrank_optax.matrix.boxes import is_box, unboxed, with_contents
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.plan import LeafPlan, views_of
from lowrank_optax.matrix.sharding import with_automatic_axes
from lowrank_optax.matrix.view import Side
from lowrank_optax.parts import Parts, check_subspace_is_enough, make_parts
from lowrank_optax.projected import full_size, gradients_by_path, is_projected
from lowrank_optax.renewal import renewed
from lowrank_optax.rules.bases import BasisRule, range_finder
from lowrank_optax.rules.random_bases import RandomBasis
from lowrank_optax.rules.ranks import RankRule
from lowrank_optax.rules.rebase import RebaseRule
from lowrank_optax.rules.residual import ResidualRule
from lowrank_optax.rules.schedules import RefreshRule, every
from lowrank_optax.subspace import Projector, ScaleByLowRankState, projectors_of_state


def scale_by_low_rank(
    inner: Inner,
    rank: int | RankRule = 128,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    residual: ResidualRule | None = None,
    side: Side = "short",
    granularity: int = 1,
    dimension_numbers: DimensionNumbers | None = None,
    scale: jax.typing.ArrayLike = 1.0,
    moments: Mapping[str, Kind] | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` inside a low-rank subspace of each gradient matrix.

    G_t (a, b) is the gradient matrix with its projected side last, P (b, r) the basis
    in use:

    .. math::
        R_t = G_t P, \quad N_t = \mathrm{inner}(R_t), \quad
        U_t = \mathrm{scale} \cdot N_t P^\top

    On a refresh P becomes a basis of the current gradient, or the next random basis.
    The ``rebase`` rule then moves the moments inside ``inner`` into the new basis: by
    P_old^T P_new, for random bases by (P_old^T P_old)^-1 P_old^T P_new. R_t is computed
    after that. A stacked leaf (scanned layers, experts) is treated matrix by matrix:
    each matrix gets the same update as alone, from draws of its own. A leaf passes to
    ``inner`` at full size if it has no matrix with a short side above the rank.

    The state of a projected matrix at granularity c, in float32: (b / c) r numbers for
    a computed basis, a c r for each moment of ``inner``, and a few scalars. An update
    costs 4 a b r flops, and ``inner`` on an (a c, r) matrix. The basis rule documents
    the cost of a refresh.

    Args:
        inner: Transformation of gradients that needs no parameters, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)``, ``optax.scale_by_lion()``,
            ``optax.scale_by_rms()``. A transformation that depends on the axes of its
            matrices, as Muon does, needs a function that makes it. The argument is {key
            path: dimension numbers, None for a vector}; (-2, -1) inside a subspace.
        rank: Columns r of the bases, >= 1, or a rule such as
            :func:`lowrank_optax.energy_rank`, or a :func:`lowrank_optax.budget`.
        basis: A computed basis, which is stored: :func:`lowrank_optax.range_finder`
            (None), :func:`lowrank_optax.exact_svd` or
            :func:`lowrank_optax.power_iteration`. Or :func:`lowrank_optax.dct_columns`,
            of which only column numbers are stored. Or a random basis, which is drawn
            again when needed, for a rank that is an int:
            :func:`lowrank_optax.gaussian` or :func:`lowrank_optax.rademacher`.
        refresh: :func:`lowrank_optax.every`, ``every(200)`` if None, or
            :func:`lowrank_optax.on_convergence`.
        rebase: Name of a rule in ``lowrank_optax.REBASE_RULES``, or a rule.
        residual: Rule for G - R P^T, the part of the gradient outside the subspace:
            :func:`lowrank_optax.scaled_residual`, ``sign_residual``,
            ``normalized_residual``, ``orthogonalized_residual``. None: it is dropped.
        side: The projected side of each matrix. "short", b = min(n, m), keeps more of a
            gradient's energy; "long", a = min(n, m), stores less: b r + 2 a r for Adam.
        granularity: c, >= 1: each matrix is seen as (a*c, b/c), and a moment takes
            a * (c r) numbers. Where c does not divide b, the largest divisor below c is
            used; ``lowrank_optax.projections`` lists the divisors.
        dimension_numbers: The axes of each leaf's matrix: a tree like the parameters,
            of ``LowRankDimensionNumbers`` or ``MuonDimensionNumbers``. A leaf with None
            stays at full size. Or a function to such a tree from the shapes of
            parameters or gradients; ``lowrank_optax.dimension_numbers_by_name`` if
            None.
        scale: Factor on the updates of projected leaves (GaLore's alpha).
        moments: Kinds of the fields of ``inner``'s state, for transformations that the
            library does not know: name -> "first", "second" or "constant".
        seed: Seed of the random draws. A draw is a function of the seed, the leaf's
            path, the matrix's place in the stack and the number of the refresh. A
            resumed run repeats its draws bit for bit; other leaves do not change them.

    Returns:
        A transformation. Its updates have the gradients' shapes and, for projected
        leaves, their dtypes. ``update`` takes full gradients, or
        :class:`lowrank_optax.Projected` for any projected leaf. For such a leaf
        ``update`` renews no computed basis, and needs ``params`` for the full shape;
        otherwise it ignores ``params``.

        ``update(..., refresh=False)``, a Python bool, leaves the renewal of bases out
        of the program: no conditional, no decomposition. A training loop runs this
        program on every step without a due basis. A leaf without a basis does not move.

    Raises:
        TypeError: If a rule is none of its kind; in ``update``, if ``refresh`` is no
            Python bool.
        ValueError: If a rank, granularity, side, kind or name is unknown, or a random
            basis has a rank by energy; in ``init``, if ``inner`` needs parameters, if
            ``inner`` has a state without a re-basing rule, or if dimension numbers do
            not fit a leaf; in ``update``, if a gradient does not fit the state.

    Example:
        A basis of rank 2 and moments of 2 columns instead of 16:

        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = scale_by_low_rank(optax.scale_by_adam(), rank=2)
        >>> state = tx.init(params)
        >>> state.subspaces["w"].basis.shape, state.inner_state.nu["w"].shape
        ((16, 2), (64, 2))

    References:
        GaLore (https://arxiv.org/abs/2403.03507), AdaRankGrad
        (https://arxiv.org/abs/2410.17881). :func:`lowrank_optax.scale_by_galore` and
        :func:`lowrank_optax.scale_by_adarankgrad` list the differences.
    """
    parts = make_parts(
        rank=rank,
        basis=range_finder() if basis is None else basis,
        refresh=every(200) if refresh is None else refresh,
        rebase=rebase,
        side=side,
        granularity=granularity,
        dimension_numbers=dimension_numbers,
        moments=moments,
        residual=residual,
        seed=seed,
    )
    core = InsideSubspace(inner, parts.residual, scale)
    return low_rank_transformation(core, parts)


def low_rank_transformation(
    core: Core, parts: Parts
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that projects, runs the core, and renews bases."""

    def init_fn(params):
        return initial_state(params, core, parts)

    def update_fn(updates, state, params=None, *, refresh=True, **extra_args):
        if not isinstance(refresh, bool):
            raise TypeError(
                "refresh must be the Python value True or False, which selects the "
                f"compiled program; got {type(refresh).__name__}. Under jax.jit close "
                "over it, or name it in static_argnames."
            )
        updates, record = as_arrays(updates), low_rank_record(unboxed(state))
        gradients = unboxed(updates)
        like = full_size(gradients, unboxed(params))

        # Projected gradients have neither full shapes nor boxes: parameters have both.
        is_whole = not any(map(is_projected, gradients_by_path(updates).values()))
        plans = parts.plans(updates if is_whole else params)

        def update(updates, state):
            given = (core, plans, parts, refresh, extra_args)
            return _update(updates, state, like, *given)

        new_updates, new_state = with_automatic_axes(
            update, (like, record), gradients, record
        )
        new_updates = jax.tree.map(
            with_contents,
            updates,
            new_updates,
            is_leaf=lambda node: is_box(node) or is_projected(node),
        )
        return new_updates, as_given(new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _update(
    updates,
    state: ScaleByLowRankState,
    like,
    core: Core,
    plans: Mapping[tuple, LeafPlan],
    parts: Parts,
    refresh,
    extra,
):
    gradients = gradients_by_path(updates)
    projectors = projectors_of_state(plans, like, slots_of(state), parts)
    _check_projected(gradients, projectors, parts)
    if refresh:
        state = renewed(updates, state, projectors)
    else:
        # Raises where the moments do not fit, as a renewal does.
        shapes = {path: projector.shape for path, projector in projectors.items()}
        others = gradients.keys() - shapes.keys()
        locate_moments(state.inner_state, shapes, others, parts.moments)
    leaves, subspaces = {}, slots_of(state)
    for path, projector in projectors.items():
        gradient = None if is_projected(gradients[path]) else gradients[path]
        basis = projector.basis(subspaces[path])
        leaves[path] = InLeaf(projector, subspaces[path], basis, gradient)

    def projected(path, gradient):
        if is_projected(gradient):
            return gradient.coordinates
        if path not in leaves:
            return gradient
        return leaves[path].projector.view.project(gradient, leaves[path].basis)

    coordinates = jax.tree_util.tree_map_with_path(
        projected, updates, is_leaf=is_projected
    )
    new_updates, inner_state, residuals = core.update(
        coordinates,
        decoded_tree(state.inner_state),
        leaves,
        views_of(plans),
        state.count,
        extra,
    )

    def in_own_dtype(path, update, leaf):
        return update.astype(leaf.dtype) if path in leaves else update

    narrow = dict(jax.tree.leaves_with_path(coordinates))
    for path, (projector, subspace, *_) in leaves.items():
        aged = projector.aged(subspace, narrow[path])
        subspaces[path] = aged._replace(residual=residuals.get(path, aged.residual))
    new_state = ScaleByLowRankState(
        jnp.asarray(optax.safe_increment(state.count)),
        with_slots(state.subspaces, subspaces),
        encoded_tree(inner_state, state.inner_state),
    )
    return jax.tree_util.tree_map_with_path(in_own_dtype, new_updates, like), new_state


def _check_projected(
    gradients: Mapping[tuple, Any], projectors: Mapping[tuple, Projector], parts: Parts
) -> None:
    """Raises ValueError if a projected gradient does not fit its leaf's subspace."""
    for path, gradient in gradients.items():
        if not is_projected(gradient):
            continue
        shape = gradient.coordinates.shape
        expected = projectors[path].shape if path in projectors else None
        if shape != expected:
            where = expected or "there is none here"
            raise ValueError(
                f"{leaf_name(path)}: a projected gradient of shape {shape} "
                f"does not fit its subspace: {where}."
            )
        check_subspace_is_enough(parts, path)
