"""``scale_by_low_rank``: any Optax transformation, run inside a low-rank subspace.

Every method of this library is a choice of five parts around an inner transformation:

===========  ====================  =========  ==============  ======================
method       basis                 rank       refresh         re-basing
===========  ====================  =========  ==============  ======================
GaLore       exact_svd             fixed      every(200)      keep
AdaRankGrad  range_finder          by energy  on_convergence  a non-negative rule
VLoRP        random, granularity   fixed      every(25)       of the first moment
ProjFactor   as VLoRP              fixed      as VLoRP        as VLoRP
===========  ====================  =========  ==============  ======================

with Adam in the subspace; ProjFactor has the first moment there and a factored second
one at full size. This module is the only place where the parts meet.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases import BasisRule, range_finder
from lowrank_optax.budget import Budget, as_stored, largest_fitting
from lowrank_optax.coded import (
    bytes_of,
    coded_record,
    decoded_tree,
    encoded_tree,
    is_coded,
)
from lowrank_optax.matrices import DimensionNumbers, Side
from lowrank_optax.moments import Kind, locate_moments
from lowrank_optax.plan import announce, listening
from lowrank_optax.random_bases import RandomBasis
from lowrank_optax.ranks import FixedRank, RankRule, as_rank_rule
from lowrank_optax.rebase import RebaseRule, as_rebase_rule
from lowrank_optax.refresh import RefreshRule, every
from lowrank_optax.sharding import (
    abstract,
    coordinate_axes,
    with_automatic_axes,
    zeros_beside,
)
from lowrank_optax.subspace import (
    Parts,
    Projector,
    Subspace,
    initial_projectors,
    projectors_of_state,
    subspace_record,
)


class LowRankState(NamedTuple):
    """State of :func:`scale_by_low_rank`.

    Attributes:
        count: Updates done; (), int32.
        subspaces: Tree like the parameters with a :class:`Subspace` for each projected
            leaf, ``optax.MaskedNode()`` for each other one.
        inner_state: State of the inner transformation for a tree like the parameters in
            which a projected leaf has shape (*stack, a*c, capacity).
    """

    count: jax.Array
    subspaces: Any
    inner_state: Any


class Core(Protocol):
    """What a low-rank transformation does with gradients that are projected."""

    def init(
        self, params: Any, coordinates: Any, projectors: Mapping[tuple, Projector]
    ) -> Any:
        """Returns its state.

        Args:
            params: Parameters, or their shapes; only those and shardings count.
            coordinates: Tree like the parameters; a projected leaf has shape
                (*stack, a*c, r).
            projectors: Of the projected leaves.
        """
        ...

    def check(self, coordinates: Any, state: Any) -> None:
        """Raises ValueError if something else is wrong with the state."""
        ...

    def update(
        self,
        gradients: Any,
        coordinates: Any,
        state: Any,
        bases: Mapping[tuple, jax.Array],
        projectors: Mapping[tuple, Projector],
        count: jax.Array,
        extra_args: Mapping[str, Any],
    ) -> tuple[Any, Any]:
        """Returns the updates, at full size for every leaf, and its new state.

        Args:
            gradients: As they came: at full size, or projected already unless
                ``Parts.needs_full_gradients``.
            coordinates: The same with projected leaves as (*stack, a*c, r).
            state: Of the core.
            bases: Of the projected leaves, (*stack, b/c, r).
            projectors: Of the projected leaves.
            count: Updates done; (), int32.
            extra_args: For an inner transformation.
        """
        ...


class InsideSubspace(NamedTuple):
    """The core of :func:`scale_by_low_rank`: any transformation, then the lift."""

    inner: optax.GradientTransformationExtraArgs
    scale: jax.typing.ArrayLike

    def init(self, params, coordinates, projectors):
        """Returns the state of ``inner``; see :class:`Core`."""
        del params, projectors
        return self.inner.init(coordinates)

    def check(self, coordinates, state):
        """Raises if ``inner`` needs parameters; see :class:`Core`."""
        if jax.tree.leaves(coordinates):
            _check_needs_no_params(self.inner, coordinates, state)

    def update(
        self, gradients, coordinates, state, bases, projectors, count, extra_args
    ):
        """Returns scale N P^T; see :class:`Core`."""
        del gradients, count
        updates, state = self.inner.update(coordinates, state, None, **extra_args)

        def lifted(path, update):
            if path not in projectors:
                return update
            # The scale goes on the small factor.
            dtype = projectors[path].dtype
            scaled = update.astype(dtype) * jnp.asarray(self.scale, dtype)
            return projectors[path].view.lift(scaled, bases[path])

        return jax.tree_util.tree_map_with_path(lifted, updates), state


def scale_by_low_rank(
    inner: optax.GradientTransformation,
    rank: int | RankRule = 128,
    *,
    basis: BasisRule | RandomBasis | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
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
    update that it would get alone. Leaves without a matrix whose short side is above
    the rank pass to ``inner`` at full size, and come out as ``inner`` makes them.

    Stored per projected matrix at granularity c: (b / c) r numbers (the basis; none if
    it is random) and a c r for each moment of ``inner``, in float32, and a few scalars.
    An update costs 4 a b r flops beside what ``inner`` does to an (a c, r) matrix; a
    refresh costs what the basis rule says.

    Args:
        inner: Transformation of gradients that needs no parameters, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)``, ``optax.scale_by_lion()``,
            ``optax.scale_by_rms()``, ``optax.contrib.scale_by_muon(...)`` (whose own
            ``weight_dimension_numbers`` must fit (*stack, a*c, r)).
        rank: Columns r of the bases, >= 1, or a rule such as
            :func:`lowrank_optax.energy_rank`, or a :func:`lowrank_optax.budget`.
        basis: :func:`lowrank_optax.range_finder` (None) or
            :func:`lowrank_optax.exact_svd`, computed and stored;
            :func:`lowrank_optax.gaussian` or :func:`lowrank_optax.rademacher`, drawn
            and not stored, for a rank that is an int.
        refresh: :func:`lowrank_optax.every`, ``every(200)`` if None, or
            :func:`lowrank_optax.on_convergence`.
        rebase: Name of a rule in ``lowrank_optax.REBASE_RULES``, or a rule.
        side: Which side of each matrix is projected. "short", b = min(n, m), keeps more
            of a gradient's energy; "long" stores less, b r + 2 a r with a = min(n, m).
        granularity: c, >= 1: each matrix is seen as (a*c, b/c) before it is projected;
            where c does not divide b, at the nearest divisor below, which
            ``lowrank_optax.projections`` lists. The moments then take a * (c r).
        dimension_numbers: Which axes of a leaf form its matrix: a tree like the
            parameters of ``LowRankDimensionNumbers`` (None: leave the leaf at full
            size), or a function from the parameters (or gradients: only their shapes
            count) to such a tree. None: ``lowrank_optax.dimension_numbers_by_shape``.
        scale: Factor on the updates of projected leaves (GaLore's alpha).
        moments: What the fields of ``inner``'s state are, for transformations that the
            library does not know: name -> "first", "second" or "constant".
        seed: Seed of the random sketches. A draw is a function of the seed, the leaf's
            path and the number of the refresh: resuming repeats it bit for bit, and
            another leaf changes nothing in it.

    Returns:
        A transformation whose updates have the gradients' shapes and, for projected
        leaves, their dtypes. Its ``update`` also takes gradients that are in their
        subspace already, (*stack, a*c, r), for any of the projected leaves; it does not
        refresh those, and needs ``params`` for their shapes. Else it ignores
        ``params``.

    Raises:
        TypeError: If ``rank`` is neither an int nor a rule.
        ValueError: If a rank, granularity, side or rule is unknown, or a random basis
            has a rank by energy; in ``init``, if ``inner`` needs
            parameters, has a state that no re-basing rule knows, or dimension numbers
            do not fit a leaf; in ``update``, if a gradient does not fit the state.

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
        seed=seed,
    )
    inner = optax.with_extra_args_support(inner)
    return low_rank_transformation(InsideSubspace(inner, scale), parts)


def make_parts(
    *,
    rank: int | RankRule,
    basis: BasisRule | RandomBasis,
    refresh: RefreshRule,
    rebase: str | RebaseRule,
    side: Side,
    granularity: int,
    dimension_numbers: DimensionNumbers | None,
    moments: Mapping[str, Kind] | None,
    seed: jax.typing.ArrayLike,
    needs_full_gradients: bool = False,
) -> Parts:
    """Returns the parts, checked.

    Raises:
        TypeError: If ``rank`` is neither an int nor a rule.
        ValueError: If a value is unknown or out of its range.
    """
    if side not in ("short", "long"):
        raise ValueError(f"side must be 'short' or 'long', got {side!r}.")
    is_int = isinstance(granularity, int) and not isinstance(granularity, bool)
    if not is_int or granularity < 1:
        raise ValueError(f"granularity must be an int >= 1, got {granularity!r}.")
    rule = as_rank_rule(rank)
    if isinstance(basis, RandomBasis) and not isinstance(rule, FixedRank):
        raise ValueError(
            "a random basis captures no energy that a rank rule could go by; give an "
            f"int as rank, got {rank!r}."
        )
    return Parts(
        rank=rule,
        basis=basis,
        refresh=refresh,
        rebase=as_rebase_rule(rebase),
        side=side,
        granularity=granularity,
        dimension_numbers=dimension_numbers,
        moments=moments or {},
        seed=seed,
        needs_full_gradients=needs_full_gradients,
    )


def low_rank_transformation(
    core: Core, parts: Parts
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that projects, runs the core, and renews bases."""

    def init_fn(params):
        return _init(params, core, _with_rank_of_budget(params, core, parts))

    def update_fn(updates, state, params=None, **extra_args):
        like = full_size(updates, params)

        def update(updates, state):
            return _update(updates, state, like, core, parts, extra_args)

        return with_automatic_axes(update, (like, state), updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_rank_of_budget(params: Any, core: Core, parts: Parts) -> Parts:
    """Returns the parts with the rank that a budget of bytes comes to."""
    if not isinstance(parts.rank, Budget):
        return parts

    def of_rank(rank: int) -> Parts:
        return parts._replace(rank=FixedRank(rank))

    def bytes_at(rank: int) -> int:
        def init(params):
            return as_stored(_init(params, core, of_rank(rank)), params)

        with listening(heard_outside=False):
            return bytes_of(jax.eval_shape(init, params))

    return of_rank(largest_fitting(bytes_at, parts.rank.limit, _most(params, parts)))


def _most(params: Any, parts: Parts) -> int:
    """Returns the largest rank at which some leaf is projected."""
    plans, _ = initial_projectors(params, parts._replace(rank=FixedRank(1)))
    views = [plan.view for plan in plans.values() if plan.view is not None]
    return max((min(v.kept_size, v.projected_size) - 1 for v in views), default=1)


def _init(params: Any, core: Core, parts: Parts) -> LowRankState:
    plans, projectors = initial_projectors(params, parts)
    announce(plans, parts)

    def subspace(path, leaf):
        if path not in projectors:
            return optax.MaskedNode()
        return projectors[path].initial(leaf)

    def coordinates(path, leaf):
        if path not in projectors:
            return leaf
        projector = projectors[path]
        axes = coordinate_axes(projector.view)
        return zeros_beside(leaf, projector.shape, projector.dtype, axes)

    in_subspace = jax.tree_util.tree_map_with_path(coordinates, params)
    inner_state = core.init(params, in_subspace, projectors)
    shapes = {path: projector.shape for path, projector in projectors.items()}
    locate_moments(inner_state, shapes, plans.keys() - shapes.keys(), parts.moments)
    core.check(in_subspace, inner_state)
    subspaces = jax.tree_util.tree_map_with_path(subspace, params)
    return LowRankState(jnp.zeros([], jnp.int32), subspaces, inner_state)


def _check_needs_no_params(inner, coordinates, state) -> None:
    """Raises if ``inner`` needs parameters."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (coordinates, state)
    )
    try:
        jax.eval_shape(lambda u, s: inner.update(u, s, None), *like)
    except Exception as error:
        # Only if parameters are what was missing: other faults surface in update.
        try:
            jax.eval_shape(lambda u, s: inner.update(u, s, u), *like)
        except Exception:
            return
        raise ValueError(
            "the inner transformation of scale_by_low_rank needs parameters, which "
            "have no meaning in the subspace; put weight decay and the like outside: "
            "optax.chain(scale_by_low_rank(optax.scale_by_adam(), ...), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))."
        ) from error


def full_size(updates: Any, params: Any) -> Any:
    """Returns the tree of the updates with the shapes that they have at full size.

    Args:
        updates: Gradients; those that are projected already have another shape than
            their parameter.
        params: Parameters, or None: no gradient is projected.
    """
    if params is None:
        return updates

    def at_full_size(update, param):
        shape = getattr(param, "shape", update.shape)
        if update.shape == shape:
            return update
        return abstract(param)

    return jax.tree.map(at_full_size, updates, params)


def _update(updates, state: LowRankState, like, core: Core, parts: Parts, extra_args):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    gradients = dict(leaves)
    state, projectors = refreshed(updates, state, like, parts, True)
    subspaces = dict(
        zip(gradients, treedef.flatten_up_to(state.subspaces), strict=True)
    )
    bases = {path: p.basis(subspaces[path]) for path, p in projectors.items()}
    coordinates = dict(gradients)
    for path, projector in projectors.items():
        if gradients[path].shape == projector.view.shape:
            coordinates[path] = projector.view.project(gradients[path], bases[path])
    new_updates, inner_state = core.update(
        updates,
        treedef.unflatten(coordinates.values()),
        decoded_tree(state.inner_state),
        bases,
        projectors,
        state.count,
        extra_args,
    )

    def in_own_dtype(path, update, leaf):
        return update.astype(leaf.dtype) if path in projectors else update

    for path, projector in projectors.items():
        subspaces[path] = projector.aged(subspaces[path], coordinates[path])
    new_state = LowRankState(
        jnp.asarray(optax.safe_increment(state.count)),
        treedef.unflatten(subspaces.values()),
        encoded_tree(inner_state, state.inner_state),
    )
    return jax.tree_util.tree_map_with_path(in_own_dtype, new_updates, like), new_state


def refreshed(
    gradients: Any,
    state: LowRankState,
    like: Any,
    parts: Parts,
    turn: jax.typing.ArrayLike,
) -> tuple[LowRankState, dict[tuple, Projector]]:
    """Returns the state with the bases renewed that are due, and all projectors.

    Args:
        gradients: Tree like the parameters. A leaf whose gradient is projected already
            keeps its basis.
        state: Of the transformation.
        like: Tree of the same with the shapes at full size.
        parts: Of the transformation.
        turn: Whether anything may be refreshed now; (), bool.

    Raises:
        ValueError: If a gradient fits neither its leaf nor its subspace.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(gradients)
    nodes = map(subspace_record, treedef.flatten_up_to(state.subspaces))
    subspaces = dict(zip((path for path, _ in leaves), nodes, strict=True))
    own = {path: x for path, x in subspaces.items() if isinstance(x, Subspace)}
    at_full_size = dict(jax.tree.leaves_with_path(like))
    projectors = projectors_of_state(at_full_size, like, own, parts)
    shapes = {path: projector.shape for path, projector in projectors.items()}
    others = subspaces.keys() - projectors.keys()
    located = locate_moments(state.inner_state, shapes, others, parts.moments)
    inner_leaves, inner_treedef = jax.tree.flatten(state.inner_state, is_leaf=is_coded)
    inner_leaves = list(map(coded_record, inner_leaves))
    # One refresh waits for the one before: temporaries are those of one leaf, and
    # jaxlib 0.10's batched LAPACK calls cannot block each other on a CPU of two cores.
    for path, gradient in leaves:
        if gradient.shape != at_full_size[path].shape:
            _check_is_projected(path, gradient, at_full_size[path], shapes)
            check_subspace_is_enough(parts, [path])
            continue
        if path not in projectors:
            continue
        subspaces[path], rebased = projectors[path].refresh(
            gradient,
            subspaces[path],
            [inner_leaves[moment.index] for moment in located[path]],
            located[path],
            state.count,
            turn,
        )
        turn &= jnp.any(subspaces[path].refreshes >= 0)
        for moment, array in zip(located[path], rebased, strict=True):
            inner_leaves[moment.index] = array
    state = state._replace(
        subspaces=treedef.unflatten(subspaces.values()),
        inner_state=inner_treedef.unflatten(inner_leaves),
    )
    return state, projectors


def check_subspace_is_enough(parts: Parts, paths: Iterable[tuple]) -> None:
    """Raises if gradients inside the subspace do not do for leaves with these paths.

    Args:
        parts: Of the transformation.
        paths: Key paths of leaves whose gradients are projected before the update.
    """
    if parts.needs_full_gradients:
        raise ValueError(
            f"{', '.join(map(jax.tree_util.keystr, paths))}: this method needs the "
            "full gradient at every update; use jax.value_and_grad."
        )


def _check_is_projected(path, gradient, leaf, shapes) -> None:
    if gradient.shape != shapes.get(path):
        raise ValueError(
            f"{jax.tree_util.keystr(path)}: a gradient of shape {gradient.shape} fits "
            f"neither its parameter, {leaf.shape}, nor its subspace, "
            f"{shapes.get(path, 'which it does not have')}."
        )
