"""What is compiled for a run: its steps and its validation."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import lowrank_optax
from experiments.distribution.host_memory import device_shardings
from experiments.distribution.mesh import rows
from experiments.distribution.placement import shard_batch
from experiments.model.adapters import restarted
from experiments.optim.methods import gradients_of
from experiments.run.parts import Parts
from experiments.run.step import make_eval_step, make_train_step
from experiments.run.work import Batch

# Names, shapes and dtypes of a batch's arrays.
_Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


class Programs:
    """The compiled programs of a run.

    The steps of batches of the shapes ``work.first_batches`` are compiled at the start;
    those of other shapes when the first such batch comes.

    Args:
        parts: Of the run.
        params: Parameters.
        opt_state: Optimizer state.

    Attributes:
        restart: :func:`experiments.model.adapters.restarted`.
        compile_seconds: For the steps of training and validation.
        compilations: Of the training step: one for each shape of a batch, and one more
            for each after the state has changed its shapes. Two programs count as one.
    """

    def __init__(self, parts: Parts, params: Any, opt_state: Any):
        self._parts = parts
        used = device_shardings(opt_state)
        self.restart = jax.jit(
            lambda params, state, key: restarted(
                params, jax.device_put(state, used), key, draw=parts.work.draw
            ),
            donate_argnums=(0, 1),
            out_shardings=jax.tree.map(lambda x: x.sharding, (params, opt_state)),
        )
        config = parts.config
        self._step = make_train_step(
            parts.work.loss,
            parts.tx,
            config.accumulate,
            gradients=gradients_of(config),
            refresh=config.refresh,
        )
        self._due = self._step.state_of(params, opt_state).due
        self.compile_seconds, self.compilations = 0.0, 0
        self._eval_step = make_eval_step(parts.work.evaluate, parts.mesh, params)
        self._compiled_evals: dict[_Shapes, Any] = {}
        self.compile_train_steps(params, opt_state)
        for batch in parts.work.first_batches:
            self._compiled_eval(params, batch)

    def compile_train_steps(self, params: Any, opt_state: Any) -> None:
        """Forgets the steps, which another state has had, and compiles the first."""
        self._seen: set[_Shapes] = set()
        for batch in self._parts.work.first_batches:
            with self._compiling(batch):
                state = lowrank_optax.TrainState(opt_state, self._due)
                self._step.compile(params, state, self._abstract(batch))

    @property
    def due(self) -> list[list[int]]:
        """What the next steps have to renew, for a checkpoint; waits for all steps."""
        return np.asarray(self._due).tolist()

    def go_on(self, due: list[list[int]]) -> None:
        """Takes what :attr:`due` was when a checkpoint was written."""
        self._due = jax.device_put(np.asarray(due, self._due.dtype), self._due.sharding)

    @property
    def train_steps(self) -> Sequence[Any]:
        """The training programs that are compiled."""
        return self._step.programs

    @property
    def peak_bytes(self) -> int | None:
        """Bytes at the peak of the training programs; None: not known."""
        params, _ = self._parts.abstract_state()
        plans = [
            lowrank_optax.memory_plan(self._parts.tx, params, step).compiled
            for step in self.train_steps
        ]
        return max((plan["peak"] for plan in plans if plan is not None), default=None)

    def will_compile(self, params: Any, opt_state: Any, batch: Batch) -> bool:
        """Returns whether the next step, on this batch, has to be compiled first."""
        state = lowrank_optax.TrainState(opt_state, self._due)
        return self._step.will_compile(params, state, self._abstract(batch))

    def train_step(self, params: Any, opt_state: Any, batch: Batch):
        """Returns parameters, state and metrics behind a step.

        Args:
            params: Parameters; donated.
            opt_state: Optimizer state; donated.
            batch: Arrays of NumPy.
        """
        state = lowrank_optax.TrainState(opt_state, self._due)
        placed = shard_batch(batch, self._parts.mesh)
        with self._compiling(batch):
            params, state, metrics = self._step(params, state, placed)
        self._due = state.due
        return params, state.optimizer, metrics

    def evaluate(self, params: Any, batch: Batch) -> Any:
        """Returns what a validation needs of a batch of NumPy arrays."""
        step = self._compiled_eval(params, batch)
        return step(params, shard_batch(batch, self._parts.mesh))

    @contextlib.contextmanager
    def _compiling(self, batch: Batch) -> Iterator[None]:
        """Lets a step be compiled inside, for batches of one shape, and counts it."""
        before = self._step.compile_seconds
        with _known(self._parts.mesh):
            yield
        self.compile_seconds += self._step.compile_seconds - before
        if _shapes(batch) not in self._seen:
            self._seen.add(_shapes(batch))
            self.compilations += 1

    def _abstract(self, batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch on the devices."""
        sharding = rows(self._parts.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in batch.items()
        }

    def _compiled_eval(self, params, batch):
        shapes = _shapes(batch)
        if shapes not in self._compiled_evals:
            started = time.monotonic()
            with _known(self._parts.mesh):
                lowered = self._eval_step.lower(params, self._abstract(batch))
            self._compiled_evals[shapes] = lowered.compile()
            self.compile_seconds += time.monotonic() - started
        return self._compiled_evals[shapes]


def _known(mesh: Any) -> contextlib.AbstractContextManager:
    """Lets what is traced see the mesh, where there is more than one device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def _shapes(batch: Batch) -> _Shapes:
    return tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
