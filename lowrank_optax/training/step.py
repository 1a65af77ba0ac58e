"""One step of training, to be compiled: gradients, update, renewal."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.optimizer import Binding, bind
from lowrank_optax.due import due_by_path
from lowrank_optax.gradients.variants import SubspaceValueAndGrad
from lowrank_optax.matrix.arrays import leaf_name, wide
from lowrank_optax.projected import Sketch, explained
from lowrank_optax.training.accumulate import Accumulation
from lowrank_optax.training.host_memory import moved_late, on_devices
from lowrank_optax.training.modules import Model, check_same_variables, loss_of
from lowrank_optax.training.placed import Placed, whole_on
from lowrank_optax.training.register import register_before, register_behind
from lowrank_optax.training.window import like_before, weighted

Refresh = Literal["sketch", "full"]
_WAYS = (
    'Give gradients="full"; or replace optax.apply_if_finite by '
    "lowrank_optax.apply_if_finite, optax.MultiSteps by micro_batches, and put any "
    "other transformation that needs gradients like the parameters behind the low-rank "
    "one."
)


class TrainState(NamedTuple):
    """State of :func:`lowrank_optax.train_step`.

    Attributes:
        optimizer: State of the optimizer.
        due: What this and the next steps have to renew; int8 (3, bases). The order of
            the bases is that of ``TrainStep.bases``.
    """

    optimizer: Any
    due: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step computes; see :func:`lowrank_optax.train_step`.

    Attributes:
        loss_fn: (model, batch, ...) -> scalar, or (scalar, aux).
        has_aux: Whether the function returns aux too.
        optimizer: The optimizer; an :class:`Accumulation` for several micro-batches.
        micro_batches: Micro-batches of a batch.
        weight: (batch, aux) -> weight of a micro-batch's loss and gradients.
        metrics: (params, optimizer state) -> more metrics.
        refresh: What a computed basis is renewed from.
        oversample: See ``SubspaceValueAndGrad.sketching``.
        full_gradients: Key paths of leaves that get full gradients; None: all.
        graph: Static part of a module; None: the model is a tree of parameters.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    optimizer: optax.GradientTransformationExtraArgs
    micro_batches: int
    weight: Callable[[Any, Any], Any]
    metrics: Callable[[Any, Any], Mapping[str, Any]]
    refresh: Refresh
    oversample: int | None
    full_gradients: tuple[str, ...] | None
    graph: Any = None

    def of(self, model: Model) -> "Step":
        """Returns the step for a model: its graph, and who gets full gradients."""
        full = self.full_gradients
        if full is not None:
            full = full_gradients_of(self.optimizer, model.params, full)
        return dataclasses.replace(self, graph=model.graph, full_gradients=full)

    @property
    def _gradient(self) -> SubspaceValueAndGrad:
        return self._gradient_with(self.full_gradients or ())

    def _gradient_with(self, full_gradients: Sequence[str]) -> SubspaceValueAndGrad:
        loss = loss_of(self.loss_fn, self.has_aux, self.graph)
        return SubspaceValueAndGrad(loss, self.optimizer, True, full_gradients)

    def due_first(self, params: Any, state: Any) -> jax.Array:
        """Returns the register before a step from an optimizer's state."""
        binding = bind(self.optimizer, params)
        return register_before(binding, state, self._sketched(binding, state))

    def _sketched(self, binding: Binding, state: Any) -> Set[str]:
        """Returns the key paths of the leaves whose bases are renewed from sketches."""
        if self.full_gradients is None or self.refresh == "full":
            return set()
        return due_by_path(binding, state).keys() - set(self.full_gradients)

    def run(
        self,
        renews: bool,
        placed: Placed,
        params: Any,
        carried: Any,
        state: TrainState,
        batch: Any,
        args: Sequence[Any],
    ) -> tuple[Any, Any, TrainState, dict[str, Any], Any]:
        """Returns parameters, what is carried, state, metrics and aux behind a step.

        Args:
            renews: Whether the step renews the bases that are due.
            placed: Where the arrays are.
            params: Parameters.
            carried: Arrays that a micro-batch hands on to the next one: what a module
                has beside its parameters.
            state: State.
            batch: Of the step.
            args: Further arguments of the loss function.
        """
        way = self._micro_batches if self.micro_batches > 1 else self._whole
        found = way(renews, placed, params, carried, state.optimizer, batch, args)
        params = optax.apply_updates(params, found.updates)
        optimizer = found.optimizer
        if found.sketches:
            renewed = self._gradient.renewed
            optimizer = renewed(params, optimizer, found.sketches)
        binding = bind(self.optimizer, params)
        sketched = self._sketched(binding, optimizer)
        states = (state.optimizer, optimizer)
        register = register_behind(binding, state.due, *states, sketched)
        metrics = {
            "loss": found.loss.astype(wide(found.loss.dtype)),
            "grad_norm": found.grad_norm,
            "due": register[-1],
            **self.metrics(params, optimizer),
        }
        state = TrainState(optimizer, register)
        return params, found.carried, state, metrics, found.aux

    def _gradients(self, renews: bool, params: Any, state: Any) -> Callable[..., Any]:
        """Returns the function of value, gradients, state and sketches."""
        if self.full_gradients is None:
            return _with_sketches(self._gradient.full)
        if not renews:
            return _with_sketches(self._gradient.keeping)
        binding = bind(self.optimizer, params)
        if self._sketched(binding, state):
            return self._gradient.sketching(oversample=self.oversample)
        computed = due_by_path(binding, state).keys()
        if computed == due_by_path(binding, state, drawn=True).keys():
            return _with_sketches(self._gradient.full)
        full = (*self.full_gradients, *computed)
        return _with_sketches(self._gradient_with(full))

    def _whole(self, renews, placed, params, carried, state, batch, args) -> "_Found":
        used = on_devices(state, placed.optimizer)
        gradients = self._gradients(renews, params, used)
        (loss, (carried, aux)), grads, left, sketches = gradients(
            params, used, carried, batch, *args
        )
        if self.full_gradients is None and placed.params is not None:
            # No array of a state in blocks says how a gradient is cut. The compiler
            # would add up whole gradients on each device.
            grads = jax.lax.with_sharding_constraint(grads, placed.params)
        state = moved_late(state, placed.optimizer, used, left, grads)
        with explained(grads, "train_step", _WAYS):
            updates, after = self.optimizer.update(
                grads, state, params, refresh=renews, value=loss
            )
        state = like_before(after, state)
        # The squares of half precision overflow.
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(wide(x.dtype)), grads))
        return _Found(loss, norm, carried, aux, updates, state, sketches)

    def _micro_batches(
        self, renews, placed, params, carried, state, batch, args
    ) -> "_Found":
        state = on_devices(state, placed.optimizer)
        gradients = self._gradients(renews, params, state)
        optimizer = self.optimizer
        assert isinstance(optimizer, Accumulation)

        def of_one(carried, state, number, batch):
            """Returns losses and gradients of a micro-batch, both times its weight."""
            own = jax.tree.map(lambda x: _of_micro_batch(x, number), args)
            (loss, (carried, aux)), grads, state, sketches = gradients(
                params, state, carried, batch, *own
            )
            weight = jnp.asarray(self.weight(batch, aux), jnp.float32)
            loss = loss.astype(wide(loss.dtype))
            state = optimizer.add(grads, state, weight, params, refresh=renews)
            sums = jax.tree.map(lambda x: weighted(x, weight), (loss, sketches))
            return carried, state, aux, (*sums, weight)

        def add(carry, numbered):
            carried, state, sums = carry
            carried, state, aux, more = of_one(carried, state, *numbered)
            return (carried, state, jax.tree.map(jnp.add, sums, more)), aux

        # Every k-th example: each device cuts up its own share.
        cut = jax.tree.map(self._cut, batch)
        numbers = jnp.arange(self.micro_batches)
        first = jax.tree.map(lambda x: x[0], (numbers, cut))
        behind, *_, shapes = jax.eval_shape(of_one, carried, state, *first)
        check_same_variables(carried, behind)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes
        )
        (carried, state, (summed, sketches, weight)), aux = jax.lax.scan(
            add, (carried, state, zeros), (numbers, cut)
        )
        weight = jnp.where(weight > 0, weight, 1)
        norm = optax.tree.norm(state.sums) / weight
        loss = summed / weight
        updates, state = optimizer.finish(state, params, refresh=renews, value=loss)
        return _Found(loss, norm, carried, aux, updates, state, sketches)

    def _cut(self, x: jax.Array) -> jax.Array:
        """Returns a batch's array as (micro_batches, examples, ...)."""
        k = self.micro_batches
        if not x.ndim or x.shape[0] % k:
            raise ValueError(
                f"a batch of shape {x.shape} cannot be cut into {k} micro-batches; "
                f"its first axis must be a multiple of {k}."
            )
        return x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1)


class _Found(NamedTuple):
    """What the gradients and the update of a step return."""

    loss: jax.Array
    grad_norm: jax.Array
    carried: Any
    aux: Any
    updates: Any
    optimizer: Any
    sketches: Mapping[str, Sketch]


def _with_sketches(gradient: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., Any]:
    """Returns the function with no sketches as its fourth result."""
    return lambda *args: (*gradient(*args), {})


def _of_micro_batch(x: Any, number: jax.Array) -> Any:
    """Returns an argument for a micro-batch: a random key of its own."""
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jnp.vectorize(lambda k: jax.random.fold_in(k, number))(x) if is_key else x


def full_gradients_of(
    optimizer: optax.GradientTransformation, params: Any, named: Sequence[str]
) -> tuple[str, ...] | None:
    """Returns the projected leaves that get full gradients.

    Args:
        optimizer: With low-rank transformations, or none.
        params: Parameters, or their shapes.
        named: Key paths of leaves that get full gradients in any case.

    Returns:
        Key paths, of the named leaves and of those whose methods need full gradients;
        None: no leaf has a gradient inside a subspace.
    """
    binding = bind(optimizer, params)
    names = {leaf_name(path) for path in binding.at_full_size} | set(named)
    if names >= {leaf_name(path) for path in binding.projected}:
        return None
    return tuple(sorted(names))


def jitted(step: Step, placed: Placed, renews: bool) -> Any:
    """Returns a step to be compiled: its arrays stay where they are, donated."""

    def run(params, carried, state, batch, args):
        return step.run(renews, placed, params, carried, state, batch, args)

    shardings = None
    if placed.params is not None:
        whole: Any = whole_on(jax.tree.leaves(placed.params)[0].mesh)
        state = TrainState(placed.optimizer, whole)
        shardings = (placed.params, None, state, whole, None)
    return jax.jit(run, out_shardings=shardings, donate_argnums=(0, 1, 2))
