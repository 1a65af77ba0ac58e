"""What is compiled for a run: its steps, by the bases they renew, and validation."""

import time
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_optax
from experiments.model.adapters import merged, restarted
from experiments.model.llama import apply
from experiments.optim.methods import OPTIMIZERS
from experiments.run.assemble import Parts
from experiments.run.renewals import Renewals, Renewed
from experiments.run.step import BATCH, make_eval_step, make_train_step


class Programs:
    """The compiled programs of a run.

    Args:
        parts: Of the run.
        params: Parameters.
        opt_state: Optimizer state.

    Attributes:
        bases: Key paths of the leaves that have bases.
        eval_step: From :func:`experiments.run.step.make_eval_step`.
        restart: :func:`experiments.model.adapters.restarted`.
        compile_seconds: For the steps of training and validation.
        compilations: Of the training step.
    """

    def __init__(self, parts: Parts, params: Any, opt_state: Any):
        self._parts = parts
        config = parts.config
        method = OPTIMIZERS[config.optimizer]
        self._in_subspace = (
            config.gradients == "subspace" and method.takes_subspace_gradients
        )
        whole = NamedSharding(parts.mesh, PartitionSpec())
        self.restart = jax.jit(restarted, donate_argnums=(0, 1), out_shardings=whole)
        self.compile_seconds, self.compilations = 0.0, 0
        self.compile_train_steps(params, opt_state)
        started = time.monotonic()
        eval_step = make_eval_step(self._apply, parts.mesh)
        self.eval_step = eval_step.lower(params, self._abstract_batch()).compile()
        self.compile_seconds += time.monotonic() - started

    def compile_train_steps(self, params: Any, opt_state: Any) -> None:
        """Compiles the step, and those that renew bases too."""
        started = time.monotonic()
        gradient = lowrank_optax.subspace_value_and_grad(lambda: None, self._parts.tx)

        def names(drawn):
            return list(
                jax.eval_shape(
                    lambda p, s: gradient.due(p, s, drawn=drawn), params, opt_state
                )
            )

        self.bases, computed = names(drawn=True), names(drawn=False)
        kinds: list[Renewed] = [()]
        if self._in_subspace and computed and self._parts.config.refresh == "apart":
            kinds += [(path,) for path in self.bases]
        elif self.bases:
            kinds += [None]

        def compiled(kind: Renewed):
            # A computed basis is renewed by a full gradient.
            full = kind is None and bool(computed)
            train_step = make_train_step(
                self._apply,
                self._parts.tx,
                self._parts.mesh,
                self._parts.config.accumulate,
                in_subspace=self._in_subspace and not full,
                renewed=kind,
                bases=self.bases,
            )
            return train_step.lower(params, opt_state, self._abstract_batch()).compile()

        self._train_steps = {kind: compiled(kind) for kind in kinds}
        self.compile_seconds += time.monotonic() - started
        self.compilations += 1

    def renewals(self, known: dict[str, Any] | None) -> Renewals:
        """Returns what says which program is next.

        Args:
            known: Of a checkpoint; None: the run starts.
        """
        return Renewals(self.bases, None in self._train_steps, known)

    @property
    def train_steps(self) -> list[Any]:
        """The programs of all kinds of steps."""
        return list(self._train_steps.values())

    def train_step(self, renewed: Renewed):
        """Returns the program that renews these bases."""
        return self._train_steps[renewed]

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        config = self._parts.config
        shape = (config.batch_size, config.sequence_length)
        return {name: jax.ShapeDtypeStruct(shape, t) for name, t in BATCH.items()}

    def _apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        return apply(self._parts.model, merged(params), tokens)
