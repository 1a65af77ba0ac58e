"""The compiled programs of a training loop, and which of them is next."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from lowrank_optax.binding.optimizer import bind
from lowrank_optax.due import due_by_path
from lowrank_optax.training.accumulate import check_accumulates_outside
from lowrank_optax.training.modules import Model, put_together, taken_apart
from lowrank_optax.training.placed import Placed, mesh_of, on_mesh, placed_of, whole_on
from lowrank_optax.training.renewals import AHEAD, Renewals
from lowrank_optax.training.shapes import first_difference, shapes_of
from lowrank_optax.training.step import Step, TrainState, jitted

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
        compile_seconds: Seconds that this took.
        ahead: Steps that may be in flight while a step is handed to the device: a step
            waits for the one before these.
    """

    ahead = AHEAD

    def __init__(self, step: Step, new_shapes: NewShapes):
        self._given = step
        self._new_shapes = new_shapes
        self._forget()
        self.bases: tuple[str, ...] = ()
        self.compilations, self.compile_seconds = 0, 0.0

    def init(self, params: Any) -> TrainState:
        """Returns the state before the first step.

        Args:
            params: Parameters, or a module of Flax NNX.
        """
        arrays = taken_apart(params).params
        mesh = mesh_of(arrays)
        if mesh is None:
            # As one program: eagerly, each of its hundreds of arrays is one.
            return self.state_of(params, jax.jit(self._given.optimizer.init)(arrays))
        return self.state_of(params, on_mesh(self._given.optimizer.init(arrays), mesh))

    def state_of(self, params: Any, optimizer: Any) -> TrainState:
        """Returns the state with an optimizer's state, and what it has to renew next.

        Use it where the optimizer's state was made elsewhere, with shardings of its
        own for instance. Shapes give shapes.

        Args:
            params: Parameters, or a module of Flax NNX.
            optimizer: State of the optimizer, as ``self.optimizer`` makes it.
        """
        check_accumulates_outside(self.optimizer, optimizer)
        model = taken_apart(params)
        arrays, step = model.params, self._given.of(model)

        def register(state):
            return step.due_first(arrays, state)

        mesh = mesh_of(arrays, optimizer)
        whole = None if mesh is None else whole_on(mesh)
        due: Any
        leaves = jax.tree.leaves(optimizer)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            due = jax.eval_shape(register, optimizer)
            due = jax.ShapeDtypeStruct(due.shape, due.dtype, sharding=whole)
        else:
            due = jax.device_put(register(optimizer), whole)
        return TrainState(optimizer, due)

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """What updates; with several micro-batches an optimizer that accumulates."""
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
        renews = self._next(model, state)
        key = _Program(renews, shapes_of((batch, args)))
        if key not in self._programs:
            self._say_new_shapes(key, batch, args)
            self._compile(key, model, state, batch, args)
        # If the step fails, the next one reads its state anew.
        self._last = None
        arrays, carried, state, scalars, aux = self._programs[key](
            model.params, model.carried, state, batch, args
        )
        assert self._renewals is not None
        self._renewals.observe(scalars["due"])
        self._last, self._renews = state, None
        metrics = self._metrics(scalars, aux)
        return put_together(params, arrays, carried), state, metrics

    def compile(self, params: Any, state: TrainState, batch: Any, *args: Any) -> None:
        """Compiles the programs for batches of one shape, before the first step.

        Args: as of a step; shapes (``jax.ShapeDtypeStruct``) are enough.
        """
        model = taken_apart(params)
        if shapes_of((model, state)) != self._shapes:
            self._adopt_shapes(model, state)
        for renews in (False, True) if self.bases else (False,):
            key = _Program(renews, shapes_of((batch, args)))
            if key not in self._programs:
                self._compile(key, model, state, batch, args)

    def will_compile(
        self, params: Any, state: TrainState, batch: Any, *args: Any
    ) -> bool:
        """Returns whether the next step has to compile a program first.

        Args: as of the step; shapes are enough for the batch and what follows.
        """
        renews = self._next(taken_apart(params), state)
        return _Program(renews, shapes_of((batch, args))) not in self._programs

    def lower(
        self, params: Any, state: TrainState, batch: Any, *args: Any, renews: bool
    ) -> Any:
        """Returns a program before its compilation (``jax.stages.Lowered``).

        Args: as of a step, or shapes; and whether the program renews bases.
        """
        model = taken_apart(params)
        step, placed = self._given.of(model), placed_of(model.params, state.optimizer)
        program = jitted(step, placed, renews)
        return program.lower(model.params, model.carried, state, batch, args)

    def function(self, *, renews: bool) -> Callable[..., Any]:
        """Returns a step as a pure function, to be traced into a program of one's own.

        Args:
            renews: Whether the function renews the bases that are due.

        Returns:
            (params, state, batch, ...) -> params, state, metrics.
        """

        def step(params, state, batch, *args):
            model = taken_apart(params)
            run, nowhere = self._given.of(model).run, Placed(None, None)
            arrays, carried, state, scalars, aux = run(
                renews, nowhere, model.params, model.carried, state, batch, args
            )
            metrics = self._metrics(scalars, aux)
            return put_together(params, arrays, carried), state, metrics

        return step

    def _metrics(self, scalars: dict[str, Any], aux: Any) -> dict[str, Any]:
        """Returns the metrics of a step for the user."""
        found = {name: x for name, x in scalars.items() if name != "due"}
        return {**found, "aux": aux} if self._given.has_aux else found

    def _next(self, model: Model, state: TrainState) -> bool:
        """Returns whether the step from a state renews bases."""
        last = self._last
        is_last = last is not None and (
            state.due is last.due and state.optimizer is last.optimizer
        )
        # A module's mode, such as that of model.eval(), is a part of its structure.
        if not is_last or jax.tree.structure((model, state)) != self._shapes[0]:
            self._adopt(model, state)
        if self._renews is None:
            assert self._renewals is not None
            self._renews = bool(self._renewals.next().any())
        return self._renews

    def _forget(self) -> None:
        self._last: TrainState | None = None
        self._renewals: Renewals | None = None
        self._renews: bool | None = None
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
        self._renewals, self._renews, self._last = Renewals(state.due), None, state

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
        self._step = self._given.of(model)
        self._placed = placed_of(model.params, state.optimizer)
        self._shapes = shapes_of((model, state))

    def _compile(self, key: _Program, model: Model, state, batch, args) -> None:
        started = time.monotonic()
        program = jitted(self._step, self._placed, key.renews)
        # Under jax.disable_jit() nothing is compiled: the step runs line by line.
        if not getattr(jax.config, "jax_disable_jit"):  # noqa: B009
            lowered = program.lower(model.params, model.carried, state, batch, args)
            program = lowered.compile()
        self._programs[key] = program
        self.compilations += 1
        self.compile_seconds += time.monotonic() - started

    def _say_new_shapes(self, key: _Program, batch: Any, args: Any) -> None:
        """Tells or refuses a batch of new shapes; of the first shapes nothing."""
        if not self._programs or any(x.batch == key.batch for x in self._programs):
            return
        known = list(dict.fromkeys(program.batch for program in self._programs))
        path, told, is_of_size = first_difference((batch, args), known[-1])
        what = f"{_name(path)}: {told}"
        if self._new_shapes == "refuse":
            way = "pad the batch" if is_of_size else "give all steps the same"
            raise ValueError(
                f"{what}: train_step(..., new_shapes='refuse') compiles for the first "
                f"shapes alone; {way}, or leave new_shapes out."
            )
        _log.warning("compiling for new shapes (number %d): %s", len(known), what)


def _name(path: tuple) -> str:
    """Returns how a leaf of (batch, further arguments) is called."""
    if not path:
        return "batch and arguments"
    which, *inside = path
    if which.idx == 0:
        return f"batch{jax.tree_util.keystr(tuple(inside))}"
    number, *inside = inside
    return f"argument {number.idx + 1}{jax.tree_util.keystr(tuple(inside))}"
