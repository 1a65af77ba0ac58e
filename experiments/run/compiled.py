"""What is compiled for a run: its steps, by the bases they renew, and validation."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax

import lowrank_optax
from experiments.distribution.host_memory import on_devices
from experiments.distribution.placement import shard_batch
from experiments.model.adapters import restarted
from experiments.optim.methods import OPTIMIZERS
from experiments.run.parts import Parts
from experiments.run.renewals import Renewals, Renewed
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
        bases: Key paths of the leaves that have bases.
        restart: :func:`experiments.model.adapters.restarted`.
        compile_seconds: For the steps of training and validation.
        compilations: Of the training step: one for each shape of a batch, and one more
            for each after the state has changed its shapes.
    """

    def __init__(self, parts: Parts, params: Any, opt_state: Any):
        self._parts = parts
        config = parts.config
        method = OPTIMIZERS[config.optimizer]
        self._in_subspace = (
            config.gradients == "subspace" and method.takes_subspace_gradients
        )
        kept = jax.tree.map(lambda x: x.sharding, (params, opt_state))
        self.restart = jax.jit(
            lambda params, state, key: restarted(
                params, on_devices(state, kept[1]), key
            ),
            donate_argnums=(0, 1),
            out_shardings=kept,
        )
        self.compile_seconds, self.compilations = 0.0, 0
        self._eval_step = make_eval_step(parts.work.evaluate, parts.mesh, params)
        self._compiled_evals: dict[_Shapes, Any] = {}
        self.compile_train_steps(params, opt_state)
        for batch in parts.work.first_batches:
            self._compiled_eval(params, batch)

    def compile_train_steps(self, params: Any, opt_state: Any) -> None:
        """Forgets the steps, which another state has had, and compiles the first."""
        gradient = lowrank_optax.subspace_value_and_grad(lambda: None, self._parts.tx)

        def names(drawn):
            return list(
                jax.eval_shape(
                    lambda p, s: gradient.due(p, s, drawn=drawn), params, opt_state
                )
            )

        self.bases, self._computed = names(drawn=True), names(drawn=False)
        self._kinds: list[Renewed] = [()]
        is_apart = self._parts.config.refresh == "apart"
        if self._in_subspace and self._computed and is_apart:
            self._kinds += [(path,) for path in self.bases]
        elif self.bases:
            self._kinds += [None]
        self._train_steps: dict[tuple[Renewed, _Shapes], Any] = {}
        for batch in self._parts.work.first_batches:
            self._compile(self._kinds, params, opt_state, batch)

    def renewals(self, known: dict[str, Any] | None) -> Renewals:
        """Returns what says which program is next.

        Args:
            known: Of a checkpoint; None: the run starts.
        """
        return Renewals(self.bases, None in self._kinds, known)

    @property
    def train_steps(self) -> Sequence[Any]:
        """The training programs that are compiled."""
        return list(self._train_steps.values())

    @property
    def peak_bytes(self) -> int | None:
        """Bytes at the peak of the training programs; None: not known."""
        params, _ = self._parts.abstract_state()
        plans = [
            lowrank_optax.memory_plan(self._parts.tx, params, step).compiled
            for step in self.train_steps
        ]
        return max((plan["peak"] for plan in plans if plan is not None), default=None)

    def is_compiled(self, renewed: Renewed, batch: Batch) -> bool:
        """Returns whether there is a program for the step of a batch."""
        return (renewed, _shapes(batch)) in self._train_steps

    def train_step(self, renewed: Renewed, params: Any, opt_state: Any, batch: Batch):
        """Returns parameters, state and metrics behind a step that renews these bases.

        Args:
            renewed: Key paths of the leaves whose bases are renewed.
            params: Parameters; donated.
            opt_state: Optimizer state; donated.
            batch: Arrays of NumPy.
        """
        if not self.is_compiled(renewed, batch):
            self._compile([renewed], params, opt_state, batch)
        step = self._train_steps[renewed, _shapes(batch)]
        return step(params, opt_state, shard_batch(batch, self._parts.mesh))

    def evaluate(self, params: Any, batch: Batch) -> Any:
        """Returns what a validation needs of a batch of NumPy arrays."""
        step = self._compiled_eval(params, batch)
        return step(params, shard_batch(batch, self._parts.mesh))

    def _compile(self, kinds: Sequence[Renewed], params, opt_state, batch) -> None:
        """Compiles the steps of these kinds for batches of one shape."""
        started, shapes = time.monotonic(), _shapes(batch)
        self.compilations += not any(x == shapes for _, x in self._train_steps)
        for kind in kinds:
            # A computed basis is renewed by a full gradient.
            full = kind is None and bool(self._computed)
            train_step = make_train_step(
                self._parts.work.loss,
                self._parts.tx,
                self._parts.mesh,
                self._parts.config.accumulate,
                in_subspace=self._in_subspace and not full,
                renewed=kind,
                bases=self.bases,
                placed=(params, opt_state),
            )
            with _known(self._parts.mesh):
                lowered = train_step.lower(params, opt_state, _abstract(batch))
            self._train_steps[kind, shapes] = lowered.compile()
        self.compile_seconds += time.monotonic() - started

    def _compiled_eval(self, params, batch):
        shapes = _shapes(batch)
        if shapes not in self._compiled_evals:
            started = time.monotonic()
            with _known(self._parts.mesh):
                lowered = self._eval_step.lower(params, _abstract(batch))
            self._compiled_evals[shapes] = lowered.compile()
            self.compile_seconds += time.monotonic() - started
        return self._compiled_evals[shapes]


def _known(mesh: Any) -> contextlib.AbstractContextManager:
    """Lets what is traced see the mesh, where there is more than one device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def _shapes(batch: Batch) -> _Shapes:
    return tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))


def _abstract(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
