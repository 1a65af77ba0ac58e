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

with Adam in the subspace, Muon for SUMO, momentum for low_rank_muon. APOLLO scales the
gradient itself, and ProjFactor has its second moment at full size: a core of its own.

An update is: project, core, lift. What renews a basis is :mod:`lowrank_optax.renewal`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.moments import Kind, locate_moments
from lowrank_optax.binding.states import (
    as_given,
    low_rank_record,
    slots_of,
    with_slots,
)
from lowrank_optax.codes import decoded_tree, encoded_tree
from lowrank_optax.core import Core, InLeaf, Inner, InsideSubspace
from lowrank_optax.initial import initial_state
from lowrank_optax.matrix.arrays import as_arrays
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
    r"""Runs ``inner`` on each gradient matrix inside a low-rank subspace of it.

    For a gradient matrix oriented to G_t (a, b), its projected side last, and the basis
    P (b, r) in use:

    .. math::
        R_t = G_t P, \quad N_t = \mathrm{inner}(R_t), \quad
        U_t = \mathrm{scale} \cdot N_t P^\top

    On a refresh P becomes a basis of the current gradient, or the next random one, and
    the moments inside ``inner`` follow under the ``rebase`` rule, before R_t is
    computed: by P_old^T P_new, for random bases by (P_old^T P_old)^-1 P_old^T P_new.
    Stacked leaves (scanned layers, experts) are treated matrix by matrix: each gets the
    update that it would get alone, with draws of its own. Leaves without a matrix whose
    short side is above the rank pass to ``inner`` at full size, and come out as
    ``inner`` makes them.

    Stored per projected matrix at granularity c: (b / c) r numbers (the basis; none if
    it is random) and a c r for each moment of ``inner``, in float32, and a few scalars.
    An update costs 4 a b r flops beside what ``inner`` does to an (a c, r) matrix; a
    refresh costs what the basis rule says.

    Args:
        inner: Transformation of gradients that needs no parameters, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)``, ``optax.scale_by_lion()``,
            ``optax.scale_by_rms()``. One that depends on which axes form a matrix, as
            Muon does: a function that makes it from {key path: the dimension numbers of
            what it gets, None for a vector}; (-2, -1) inside a subspace.
        rank: Columns r of the bases, >= 1, or a rule such as
            :func:`lowrank_optax.energy_rank`, or a :func:`lowrank_optax.budget`.
        basis: :func:`lowrank_optax.range_finder` (None),
            :func:`lowrank_optax.exact_svd` or :func:`lowrank_optax.power_iteration`,
            computed and stored;
            :func:`lowrank_optax.gaussian` or :func:`lowrank_optax.rademacher`, drawn
            and not stored, for a rank that is an int.
        refresh: :func:`lowrank_optax.every`, ``every(200)`` if None, or
            :func:`lowrank_optax.on_convergence`.
        rebase: Name of a rule in ``lowrank_optax.REBASE_RULES``, or a rule.
        residual: What becomes of G - R P^T, which the subspace does not hold:
            :func:`lowrank_optax.scaled_residual`, ``sign_residual``,
            ``normalized_residual``, ``orthogonalized_residual``. None: nothing.
        side: Which side of each matrix is projected. "short", b = min(n, m), keeps more
            of a gradient's energy; "long" stores less, b r + 2 a r with a = min(n, m).
        granularity: c, >= 1: each matrix is seen as (a*c, b/c) before it is projected;
            where c does not divide b, at the nearest divisor below, which
            ``lowrank_optax.projections`` lists. The moments then take a * (c r).
        dimension_numbers: Which axes of a leaf form its matrix: a tree like the
            parameters of ``LowRankDimensionNumbers`` or ``MuonDimensionNumbers`` (None:
            leave the leaf at full size), or a function from the parameters (or
            gradients: only their shapes count) to such a tree. None:
            ``lowrank_optax.dimension_numbers_by_name``.
        scale: Factor on the updates of projected leaves (GaLore's alpha).
        moments: What the fields of ``inner``'s state are, for transformations that the
            library does not know: name -> "first", "second" or "constant".
        seed: Seed of the random sketches. A draw is a function of the seed, the leaf's
            path, the matrix' place in the stack and the number of the refresh: resuming
            repeats it bit for bit, and another leaf changes nothing in it.

    Returns:
        A transformation whose updates have the gradients' shapes and, for projected
        leaves, their dtypes. Its ``update`` takes gradients at full size, or
        :class:`lowrank_optax.Projected` for any of the projected leaves; it does not
        refresh those, and needs ``params`` for their shapes. Else it ignores
        ``params``.

        ``update(..., refresh=False)``, a Python bool, leaves the renewal of bases out
        of the program: no conditional, no decomposition. A training loop runs it on all
        steps but those on which a basis is due. A leaf that has no basis yet does not
        move in it.

    Raises:
        TypeError: If ``rank`` is neither an int nor a rule; in ``update``, if
            ``refresh`` is no Python bool.
        ValueError: If a rank, granularity, side or rule is unknown, or a random basis
            has a rank by energy; in ``init``, if ``inner`` needs parameters, has a
            state that no re-basing rule knows, or dimension numbers do not fit a leaf;
            in ``update``, if a gradient does not fit the state.

    Example:
        A basis of rank 2 and moments of 2 columns instead of 16:

        >>> params = {"w": jnp.ones((64, 16))}
        >>> tx = scale_by_low_rank(optax.scale_by_adam(), rank=2)
        >>> state = tx.init(params)
        >>> state.subspaces["w"].basis.shape, state.inner_state.nu["w"].shape
        ((16, 2), (64, 2))

    References:
        GaLore (https://arxiv.org/abs/2403.03507), AdaRankGrad
        (https://arxiv.org/abs/2410.17881). :func:`lowrank_optax.galore` and
        :func:`lowrank_optax.adarankgrad` say where they differ.
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
                "refresh must be the Python value True or False, for it decides what "
                f"is compiled; got {type(refresh).__name__}. Under jax.jit close over "
                "it, or name it in static_argnames."
            )
        updates, record = as_arrays(updates), low_rank_record(unboxed(state))
        gradients = unboxed(updates)
        like = full_size(gradients, unboxed(params))

        # Of projected gradients the parameters know the shapes, and boxes name axes.
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
        # As a renewal does, it raises where moments do not fit.
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
    """Raises if a gradient is projected, and should not be, or not so."""
    for path, gradient in gradients.items():
        if not is_projected(gradient):
            continue
        shape = gradient.coordinates.shape
        expected = projectors[path].shape if path in projectors else None
        if shape != expected:
            where = expected or "which it does not have here"
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: a projected gradient of shape {shape} "
                f"does not fit its subspace, {where}."
            )
        check_subspace_is_enough(parts, path)
