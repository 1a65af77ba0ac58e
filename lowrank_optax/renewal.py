"""Renewal: a due basis follows the gradients, and the moments follow the basis.

No other code of an update has a decomposition or a draw of a new basis. One conditional
stands in front of all leaves. Behind it each kind of leaf has one loop, with one
iteration for each due leaf.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.binding.moments import Moment, locate_moments
from lowrank_optax.binding.optimizer import Binding
from lowrank_optax.binding.states import (
    map_low_rank_states,
    slots_of,
    with_slots,
)
from lowrank_optax.codes import coded_record, decode, encode, is_coded
from lowrank_optax.due import asked
from lowrank_optax.fitting import below, blended, with_basis_of
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.projected import Sketch, gradients_by_path, is_projected
from lowrank_optax.rules.products import is_usable
from lowrank_optax.rules.rebase import random_transfer, rebased, transfer
from lowrank_optax.subspace import (
    Projector,
    ScaleByLowRankState,
    Subspace,
)


def renewed(
    gradients: Any,
    state: ScaleByLowRankState,
    projectors: Mapping[tuple, Projector],
    again: bool | jax.Array = False,
) -> ScaleByLowRankState:
    """Returns the state with due bases renewed and the moments re-based.

    Args:
        gradients: Tree like the parameters, of full gradients or their sketches. A leaf
            with a :class:`Projected` gradient keeps its basis. Random bases need no
            gradient.
        state: State of the transformation.
        projectors: Projectors of the projected leaves.
        again: Whether an earlier micro-batch of the same update came before; see
            :func:`lowrank_optax.due.asked`.
    """
    if not projectors:
        return state
    parts = next(iter(projectors.values())).parts
    subspaces = slots_of(state)
    found = gradients_by_path(gradients)
    shapes = {path: projector.shape for path, projector in projectors.items()}
    others = found.keys() - shapes.keys()
    located = locate_moments(state.inner_state, shapes, others, parts.moments)
    inner, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_coded)
    inner = list(map(coded_record, inner))
    leaves = {}
    for path, projector in projectors.items():
        gradient = None if parts.is_random else found[path]
        if is_projected(gradient):
            continue
        due, subspace = asked(subspaces[path], state.count, parts, again)
        renewable = _Renewable(subspace, [inner[x.index] for x in located[path]])
        leaves[path] = _Leaf(projector, located[path], gradient, due, renewable)
    if not leaves:
        return state
    kinds = _kinds(leaves.values())
    before = [[leaf.renewable for leaf in kind] for kind in kinds]

    def renew_all():
        return [_renew_kind(kind, state.count) for kind in kinds]

    any_due = functools.reduce(
        jnp.logical_or, (jnp.any(leaf.due) for leaf in leaves.values())
    )
    after = jax.lax.cond(any_due, renew_all, lambda: before)
    for kind, new in zip(kinds, after, strict=True):
        for leaf, (subspace, moments) in zip(kind, new, strict=True):
            subspaces[leaf.projector.path] = subspace
            for moment, array in zip(leaf.moments, moments, strict=True):
                inner[moment.index] = array
    return state._replace(
        subspaces=with_slots(state.subspaces, subspaces),
        inner_state=treedef.unflatten(inner),
    )


def renewed_everywhere(
    gradients: Any,
    state: Any,
    like: Any,
    binding: Binding,
    kept: Any,
    again: Any = False,
) -> Any:
    """Returns an optimizer's state with due bases renewed, in all its transformations.

    Args:
        gradients: Tree like the parameters of the whole optimizer.
        state: State of the whole optimizer.
        like: Tree like the gradients, with full shapes.
        binding: Binding of the optimizer.
        kept: Parts of a transformation -> whether its bases stay as they are.
        again: Whether an earlier micro-batch of the same update came before.
    """

    def of_node(node):
        if not slots_of(node) or kept(binding.of(node).parts):
            return node
        own = binding.own(gradients, node)
        return renewed(own, node, binding.projectors(like, node), again)

    return map_low_rank_states(of_node, state)


class _Renewable(NamedTuple):
    """The parts of one leaf's state that a renewal changes.

    Attributes:
        subspace: Subspace of the leaf.
        moments: Moments of the leaf, coded or not.
    """

    subspace: Subspace
    moments: list[Any]


class _Leaf(NamedTuple):
    """One leaf with its due matrices.

    Attributes:
        projector: Projector of the leaf.
        moments: Place and kind of each moment.
        gradient: Full gradient, or its sketch; None for a random basis.
        due: Whether each matrix is due; bool (*stack,).
        renewable: The state to renew.
    """

    projector: Projector
    moments: Sequence[Moment]
    gradient: Any
    due: jax.Array
    renewable: _Renewable


def _kinds(leaves: Iterable[_Leaf]) -> list[list[_Leaf]]:
    """Returns the leaves in groups, where one program serves each leaf of a group.

    The leaves of a group have the same place in several layers: their arrays are alike,
    and their paths differ in numbers alone. Such leaves are sharded alike too, so that
    picking one of them moves no data.
    """
    kinds: dict[Any, list[_Leaf]] = {}
    for leaf in leaves:
        arrays = jax.tree.leaves((leaf.renewable, leaf.gradient))
        place = leaf_name(leaf.projector.path)
        key = (
            re.sub(r"\d+", "", place),
            leaf.projector.view,
            tuple(moment.kind for moment in leaf.moments),
            jax.tree.structure(leaf.renewable),
            tuple(map(jax.typeof, arrays)),
        )
        kinds.setdefault(key, []).append(leaf)
    return list(kinds.values())


def _renew_kind(kind: Sequence[_Leaf], count: jax.Array) -> list[_Renewable]:
    """Returns the renewed state of each leaf of one kind."""
    pending = jnp.stack([jnp.any(leaf.due) for leaf in kind])
    names = jnp.asarray([leaf.projector.name_hash for leaf in kind], jnp.uint32)
    fractions = jnp.asarray([leaf.projector.fraction for leaf in kind], jnp.float32)

    def one_leaf(carry):
        pending, renewables = carry
        index = jnp.argmax(pending).astype(jnp.int32)
        leaf = kind[0]._replace(
            gradient=_pick(index, [leaf.gradient for leaf in kind]),
            due=_pick(index, [leaf.due for leaf in kind]),
            renewable=_pick(index, renewables),
        )
        # No decomposition for zeros, for instance of an expert without a token.
        new = jax.lax.cond(
            jnp.any(leaf.due & _has_basis(leaf)),
            lambda: _renew_leaf(leaf, count, names[index], fractions[index]),
            lambda: _failed(leaf, leaf.due),
        )
        return pending.at[index].set(False), _put(index, new, renewables)

    start = (pending, [leaf.renewable for leaf in kind])
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_leaf, start)[1]


def _has_basis(leaf: _Leaf) -> jax.Array:
    """Returns the matrices that can have a basis (finite, not zero), bool (*stack,)."""
    if leaf.gradient is None:
        return jnp.ones_like(leaf.due)
    if isinstance(leaf.gradient, Sketch):
        return is_usable(leaf.gradient.rows)[..., 0, 0]
    return is_usable(leaf.projector.view.matrices(leaf.gradient))[..., 0, 0]


def _failed(leaf: _Leaf, failed: jax.Array) -> _Renewable:
    """Returns the old subspace and moments, with another failure of these matrices."""
    subspace, moments = leaf.renewable
    failures = subspace.failures + failed.astype(jnp.int32)
    return _Renewable(subspace._replace(failures=failures), moments)


def _pick(index: jax.Array, trees: Sequence[Any]) -> Any:
    """Returns the tree with this number, without a copy of all trees."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *arrays: jax.lax.select_n(index, *arrays), *trees)


def _put(index: jax.Array, new: Any, trees: Sequence[Any]) -> list[Any]:
    """Returns the trees with ``new`` in place of the tree with this number."""
    if len(trees) == 1:
        return [new]
    return [
        jax.tree.map(lambda x, y, i=i: jnp.where(index == i, x, y), new, old)
        for i, old in enumerate(trees)
    ]


def _renew_leaf(
    leaf: _Leaf, count: jax.Array, name_hash: jax.Array, fraction: jax.Array
) -> _Renewable:
    """Returns subspace and moments, renewed for the matrices that are due."""
    projector, (subspace, moments) = leaf.projector, leaf.renewable
    parts, is_first = projector.parts, subspace.refreshes == 0
    wide = [decode(moment) for moment in moments]
    kinds = [moment.kind for moment in leaf.moments]
    new = subspace._replace(
        age=jnp.where(is_first, parts.refresh.first_age(fraction), 0).astype(jnp.int32),
        refreshes=subspace.refreshes + 1,
        failures=jnp.zeros_like(subspace.failures),
    )
    if parts.is_random:
        found = jnp.ones_like(leaf.due)
        # Both bases in one draw: half as much program to compile.
        numbers = jnp.stack([subspace.refreshes, new.refreshes]) - 1
        r = random_transfer(*projector.drawn(numbers, name_hash))
    else:
        means = [x for x, kind in zip(wide, kinds, strict=True) if kind == "first"]
        source = blended(leaf.gradient, means, subspace, projector, count)
        new, found = with_basis_of(source, new, projector, name_hash, count)
        r = transfer(*map(projector.columns_of, (subspace.basis, new.basis)))
        # The selection below then waits for r, and writes over the old basis. XLA would
        # copy the old basis at every update if r might still need it.
        found &= jnp.all(jnp.isfinite(r), axis=(-1, -2))
    followed = rebased(wide, kinds, r, count, parts.rebase)
    followed = [below(new.rank, x) for x in followed]
    followed = [encode(x, old) for x, old in zip(followed, moments, strict=True)]
    renews = leaf.due & found
    return _Renewable(
        _where(renews, new, _failed(leaf, leaf.due & ~found).subspace),
        # Before the first basis there is nothing to follow.
        _where(renews & ~is_first, followed, moments),
    )


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Returns ``new`` or ``old`` for each matrix of the stack, leaf by leaf."""

    def select(x, y):
        axes = tuple(range(condition.ndim, y.ndim))
        return jnp.where(jnp.expand_dims(condition, axes), x, y)

    return jax.tree.map(select, new, old)
