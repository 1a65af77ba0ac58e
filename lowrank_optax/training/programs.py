"""The compiled programs of a training loop, and which of them is next."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.binding.optimizer import bind
from lowrank_optax.due import due_again, due_by_path
from lowrank_optax.training.modules import (
    Model,
    called,
    put_together,
    shapes_of,
    taken_apart,
)
from lowrank_optax.training.renewals import AHEAD, Renewals, first_register
from lowrank_optax.training.step import (
    Placed,
    Step,
    TrainState,
    full_gradients_of,
)

_log = logging.getLogger(__name__)

NewShapes = Literal["compile", "refuse"]


class _Program(NamedTuple):
    """What tells the programs of one model and state apart.

    Attributes:
        renews: Whether the program renews bases.
        batch: Shapes of the batch and of further arguments.
    """

    renews: bool
    batch: Any


class TrainStep:
    """The object that :func:`train_step` returns.

    Attributes:
        bases: Key paths of the leaves with bases; known from the first model on.
        compilations: Programs compiled so far.
    """

    def __init__(self, loss_fn: Any, step: Step, has_aux: bool, new_shapes: NewShapes):
        self._loss_fn = loss_fn
        self._given = step
        self._has_aux = has_aux
        self._new_shapes = new_shapes
        self._forget()
        self.bases: tuple[str, ...] = ()
        self.compilations = 0

    def init(self, params: Any) -> TrainState:
        """Returns the state before the first step.

        Args:
            params: Parameters, or a module of Flax NNX.
        """
        arrays = taken_apart(params).params
        optimizer = jax.jit(self._given.optimizer.init)(arrays)
        return self.state_of(params, optimizer)

    def state_of(self, params: Any, optimizer: Any) -> TrainState:
        """Returns the state with an optimizer's state, and with all bases due.

        Use it where the optimizer's state was made elsewhere, with shardings of its
        own for instance.

        Args:
            params: Parameters, or a module of Flax NNX.
            optimizer: State of the optimizer, as ``self.optimizer`` makes it.
        """
        binding = bind(self._given.optimizer, taken_apart(params).params)
        again = list(due_again(binding, optimizer, AHEAD).values())
        return TrainState(optimizer, first_register(jnp.array(again, bool)))

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer: with several micro-batches one that accumulates."""
        return self._given.optimizer

    @property
    def programs(self) -> list[Any]:
        """The compiled programs of the model and state in use."""
        return list(self._programs.values())

    def __call__(
        self, params: Any, state: TrainState, batch: Any, *args: Any
    ) -> tuple[Any, TrainState, dict[str, Any]]:
        """Returns parameters, state and metrics behind a step.

        Args:
            params: Parameters; donated. Or a module, which is changed in place.
            state: From :meth:`init` or from the step before; donated.
            batch: First argument of the loss function behind the parameters.
            args: Further arguments of the loss function: pytrees of arrays, typed
                random keys among them.
        """
        model = taken_apart(params)
        if state.due is not self._due:
            self._adopt(model, state)
        assert self._renewals is not None
        # What comes now may fail, and the step would then not be counted.
        renewals, self._due = self._renewals, None
        renews = bool(renewals.next().any())
        program = self._compiled(renews, model, state, batch, args)
        arrays, carried, state, scalars, aux = program(
            model.params, model.carried, state, batch, args
        )
        renewals.observe(scalars.pop("due"))
        self._due = state.due
        metrics = {**scalars, "aux": aux} if self._has_aux else scalars
        return put_together(params, arrays, carried), state, metrics

    def compile(self, params: Any, state: TrainState, batch: Any, *args: Any) -> None:
        """Compiles the programs for batches of one shape, before the first step.

        Args: as of a step; shapes (``jax.ShapeDtypeStruct``) are enough.
        """
        model = taken_apart(params)
        if shapes_of((model, state)) != self._shapes:
            self._adopt_shapes(model, state)
        for renews in (False, True)[: 2 if self.bases else 1]:
            self._compiled(renews, model, state, batch, args)

    def is_compiled(self, batch: Any, *args: Any) -> bool:
        """Returns whether no step on a batch of these shapes has to compile."""
        shapes = shapes_of((batch, args))
        kinds = (False, True)[: 2 if self.bases else 1]
        return all(_Program(renews, shapes) in self._programs for renews in kinds)

    def _forget(self) -> None:
        self._due: Any = None
        self._renewals: Renewals | None = None
        self._shapes: Any = None
        self._step: Step = self._given
        self._placed = Placed(None, None)
        self._programs: dict[_Program, Any] = {}

    def _bases(self, arrays: Any, optimizer: Any) -> tuple[str, ...]:
        binding = bind(self._given.optimizer, arrays)
        found = jax.eval_shape(lambda s: due_by_path(binding, s, drawn=True), optimizer)
        return tuple(found)

    def _adopt(self, model: Model, state: TrainState) -> None:
        """Takes a state that no step of this object has returned last; it is read."""
        if shapes_of((model, state)) != self._shapes:
            self._adopt_shapes(model, state)
        self._renewals = Renewals(state.due)

    def _adopt_shapes(self, model: Model, state: TrainState) -> None:
        """Takes a model and a state of new shapes, and forgets the old programs."""
        self._forget()
        self.bases = self._bases(model.params, state.optimizer)
        if state.due.shape[-1:] != (len(self.bases),):
            raise ValueError(
                f"the state knows {state.due.shape[-1]} bases, and the optimizer's "
                f"state has {len(self.bases)}; make it by init or state_of of this "
                "train_step."
            )
        if self._given.full_gradients is None:
            full = None
        else:
            full = full_gradients_of(
                self._given.optimizer, model.params, self._given.full_gradients
            )
        self._step = dataclasses.replace(
            self._given, loss=self._loss(model.graph), full_gradients=full
        )
        self._placed = _placed(model.params, state.optimizer)
        self._shapes = shapes_of((model, state))

    def _loss(self, graph: Any) -> Callable[..., Any]:
        """Returns the loss function as a step calls it."""

        def loss(params, carried, batch, *args):
            found, carried = called(self._loss_fn, graph, params, carried, batch, *args)
            if self._has_aux and not (isinstance(found, tuple) and len(found) == 2):
                raise TypeError(
                    "loss_fn must return (scalar, aux), as has_aux=True says, not "
                    f"{type(found).__name__}."
                )
            value, aux = found if self._has_aux else (found, None)
            if jnp.shape(value) != ():
                what = jax.tree.map(jnp.shape, value)
                raise TypeError(f"loss_fn must return a scalar, not shape {what}.")
            return value, (carried, aux)

        return loss

    def _compiled(self, renews: bool, model: Model, state, batch, args) -> Any:
        """Returns the program for a step, compiled if it is not."""
        key = _Program(renews, shapes_of((batch, args)))
        if key not in self._programs:
            self._say_new_shapes(key, batch)
            lowered = self._jitted(renews, model).lower(
                model.params, model.carried, state, batch, args
            )
            self._programs[key] = lowered.compile()
            self.compilations += 1
        return self._programs[key]

    def _say_new_shapes(self, key: _Program, batch: Any) -> None:
        """Tells or refuses a batch of new shapes; of the first shapes nothing."""
        if not self._programs or any(x.batch == key.batch for x in self._programs):
            return
        known = len({program.batch for program in self._programs})
        what = jax.tree.map(lambda x: tuple(np.shape(x)), batch)
        if self._new_shapes == "refuse":
            raise ValueError(
                f"a batch of new shapes, {what}: train_step(..., "
                "new_shapes='refuse') compiles for the first shapes alone; pad the "
                "batch, or leave new_shapes out."
            )
        _log.warning("compiling for batches of new shapes (number %d): %s", known, what)

    def _jitted(self, renews: bool, model: Model) -> Any:
        step, placed = self._step, self._placed

        def run(params, carried, state, batch, args):
            *new, metrics = step.run(
                renews, placed, params, carried, state, batch, args
            )
            aux = metrics.pop("aux")
            return *new, metrics, aux

        shardings = None
        if placed.params is not None:
            mesh = jax.tree.leaves(placed.params)[0].mesh
            whole = NamedSharding(mesh, PartitionSpec())
            state = TrainState(placed.optimizer, whole)
            shardings = (placed.params, None, state, whole, None)
        return jax.jit(run, out_shardings=shardings, donate_argnums=(0, 1, 2))


def _placed(params: Any, optimizer: Any) -> Placed:
    """Returns the shardings of arrays that all are on a mesh."""
    shardings = jax.tree.map(
        lambda x: getattr(x, "sharding", None), (params, optimizer)
    )
    leaves = jax.tree.leaves((params, optimizer))
    found = [getattr(x, "sharding", None) for x in leaves]
    if not all(isinstance(x, NamedSharding) for x in found):
        return Placed(None, None)
    return Placed(*shardings)
