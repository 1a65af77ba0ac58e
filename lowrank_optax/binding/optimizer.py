"""``bind``: the low-rank transformations of an optimizer, and the leaves of each."""

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Set
from typing import Any, NamedTuple

import jax
import optax
from jax.core import Tracer

from lowrank_optax.binding.numbers import computed, replaced, traced_numbers
from lowrank_optax.binding.states import is_slot, slots_of
from lowrank_optax.matrix.arrays import as_arrays, leaf_name
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.matrix.inference import is_in_model
from lowrank_optax.matrix.plan import LeafPlan
from lowrank_optax.matrix.roles import Assigned
from lowrank_optax.matrix.sharding import abstract
from lowrank_optax.parts import Parts
from lowrank_optax.projected import gradients_by_path
from lowrank_optax.rules.budget import storage
from lowrank_optax.subspace import Projector, ScaleByLowRankState, projectors_of_state


class Bound(NamedTuple):
    """The decisions of one low-rank transformation in its ``init``.

    Attributes:
        plans: Key path -> plan, for every leaf of the transformation.
        parts: The choices that make the subspaces.
    """

    plans: Mapping[tuple, LeafPlan]
    parts: Parts

    @property
    def projected(self) -> Set[tuple]:
        """Key paths of the projected leaves."""
        return {path for path, plan in self.plans.items() if plan.is_projected}


class _Heard(NamedTuple):
    """The announcements of a running ``init`` so far."""

    bound: list[Bound]
    roles: dict[tuple, Assigned]


_listeners: contextvars.ContextVar[_Heard | None] = contextvars.ContextVar(
    "lowrank_optax_bound", default=None
)


def announce(plans: Mapping[tuple, LeafPlan], parts: Parts) -> bool:
    """Tells a running :func:`bind` the decisions of ``init``; returns if one runs."""
    heard = _listeners.get()
    if heard is not None:
        heard.bound.append(Bound(plans, parts))
    return heard is not None


def announce_roles(roles: Mapping[tuple, Assigned]) -> None:
    """Tells a running :func:`bind` the role of each leaf, by key path."""
    heard = _listeners.get()
    if heard is not None:
        heard.roles.update(roles)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Hides the announcements inside the context from a running :func:`bind`."""
    token = _listeners.set(None)
    try:
        yield
    finally:
        _listeners.reset(token)


@dataclasses.dataclass(frozen=True)
class Binding:
    """An optimizer's low-rank transformations for given parameters; see :func:`bind`.

    Attributes:
        transformations: The decisions of each transformation.
        roles: Key path -> role, for the leaves under ``by_role``.
    """

    transformations: tuple[Bound, ...]
    roles: Mapping[tuple, Assigned]

    def of(self, node: ScaleByLowRankState) -> Bound:
        """Returns the transformation of a low-rank state.

        Raises:
            ValueError: If the state is not of this optimizer.
        """
        paths = slots_of(node).keys()
        found = [who for who in self.transformations if who.projected == paths]
        if len(found) != 1:
            raise ValueError(
                "no low-rank transformation of this optimizer projects exactly "
                f"{', '.join(map(jax.tree_util.keystr, paths))}, as this state does; "
                "was the state made by this optimizer, for these parameters?"
            )
        return found[0]

    def own(self, tree: Any, node: ScaleByLowRankState) -> Any:
        """Returns the part of a tree for the transformation of a low-rank state.

        Args:
            tree: Tree like the parameters of the whole optimizer.
            node: One of the low-rank states in the optimizer's state.
        """
        given = self.of(node).plans
        leaves = gradients_by_path(tree)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: leaves[path] if path in given else optax.MaskedNode(),
            node.subspaces,
            is_leaf=is_slot,
        )

    def projectors(
        self, tree: Any, node: ScaleByLowRankState
    ) -> dict[tuple, Projector]:
        """Returns the projectors of the leaves with a subspace in a low-rank state.

        Args:
            tree: Parameters of the whole optimizer, or their shapes.
            node: One of the low-rank states in the optimizer's state.

        Raises:
            ValueError: If the state does not fit the parameters.
        """
        own = self.own(tree, node)
        plans, parts = self.of(node)
        return projectors_of_state(plans, own, slots_of(node), parts)

    @property
    def shared(self) -> Set[tuple]:
        """Key paths of projected leaves that belong to a second transformation too.

        The second transformation needs the full gradient of such a leaf, so that the
        gradient cannot be projected beforehand.
        """
        given = [path for who in self.transformations for path in who.plans]
        return {path for path in self.projected if given.count(path) > 1}

    @property
    def at_full_size(self) -> Set[tuple]:
        """Key paths of projected leaves whose methods need full gradients."""
        found = {
            path
            for who in self.transformations
            for path in who.projected
            if who.parts.uses_residual or who.parts.follows_each_gradient
        }
        return found | self.shared

    @property
    def projected(self) -> Mapping[tuple, LeafPlan]:
        """Key path -> plan of every projected leaf."""
        return {
            path: who.plans[path]
            for who in self.transformations
            for path in who.plans
            if who.plans[path].is_projected
        }


def bind(optimizer: optax.GradientTransformation, params: Any) -> Binding:
    """Returns the low-rank transformations of an optimizer, with their leaves.

    A second call with parameters of these shapes returns the first one's result: to
    trace ``init`` takes a second for a model of many arrays, and a step asks often.

    The binding comes from the optimizer's own ``init`` on shapes: nothing is allocated,
    and chains, masks and partitions are followed at any depth. Numbers that
    ``optax.inject_hyperparams`` has made arrays have the values of ``init``.

    Args:
        optimizer: Any Optax transformation.
        params: Parameters, or their shapes.

    Raises:
        TypeError: If a leaf is neither an array nor a number.
        ValueError: If two transformations project the same leaf, or a transformation
            projects a leaf that the parameters lack.
    """
    shapes = jax.tree.map(abstract, as_arrays(params))
    known, key = _known_bindings(optimizer.init), _key(shapes)
    if key in known:
        return known[key]
    made = _bind(optimizer, shapes)
    # An array of a trace around this call ends with the trace.
    if key and not traced_numbers([who.parts for who in made.transformations]):
        known[key] = made
    return made


# Function init -> key of the parameters -> what it decided. It lives as long as init.
_bindings: MutableMapping[Callable, dict[Hashable, Binding]] = (
    weakref.WeakKeyDictionary()
)


def _known_bindings(init: Callable) -> dict[Hashable, Binding]:
    try:
        return _bindings.setdefault(init, {})
    except TypeError:  # It cannot be hashed, or not be referred to weakly.
        return {}


def _key(shapes: Any) -> Hashable:
    """Returns what a binding depends on, besides the optimizer.

    None, if that cannot be told: inside the ``init`` of another transformation, which
    shows a whole model or a storage format, or with metadata that cannot be hashed.
    """
    if is_in_model() or storage() is not None:
        return None
    leaves, structure = jax.tree.flatten(shapes)
    mesh, x64 = jax.sharding.get_abstract_mesh(), jax.config.read("jax_enable_x64")
    key = (*leaves, structure, mesh, x64)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _bind(optimizer: optax.GradientTransformation, params: Any) -> Binding:
    heard = _Heard([], {})
    token = _listeners.set(heard)

    def numbers(params: Any) -> list[Tracer]:
        optimizer.init(params)
        return [x for who in heard.bound for x in traced_numbers(who.parts)]

    try:
        # A new function each time: a cached init would not be called again.
        program = jax.make_jaxpr(numbers)(params)
    finally:
        _listeners.reset(token)
    values = iter(computed(program) if program.jaxpr.outvars else ())
    bound = [
        who._replace(parts=replaced(who.parts, lambda _: next(values)))
        for who in heard.bound
    ]
    seen: set[tuple] = set()
    leaves = leaves_by_path(params)
    for who in bound:
        if strange := who.projected - leaves.keys():
            names, some = map(leaf_name, strange), map(leaf_name, list(leaves)[:4])
            raise ValueError(
                f"the optimizer projects {', '.join(names)}, and the parameters have "
                f"{', '.join(some)}: it hands on a part of them, as optax.lookahead "
                "does. Such an optimizer gets full gradients, from jax.value_and_grad; "
                "put accumulate and apply_if_finite inside it."
            )
        twice = seen & who.projected
        if twice:
            raise ValueError(
                f"{', '.join(map(jax.tree_util.keystr, twice))}: two low-rank "
                "transformations project it; give this leaf to a single one, by "
                "dimension_numbers, optax.masked or optax.partition."
            )
        seen |= who.projected
    return Binding(tuple(bound), heard.roles)
