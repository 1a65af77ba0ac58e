"""What is compiled for a run: its steps, by the bases they renew, and validation."""

import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_optax
from experiments.model.adapters import merged, restarted
from experiments.model.llama import apply
from experiments.optim.methods import OPTIMIZERS
from experiments.run.assemble import Parts
from experiments.run.step import BATCH, make_eval_step, make_train_step

# Key paths of the leaves whose bases a step renews; None: of all that are due, or all
# gradients are full ones anyway.
Renewed = tuple[str, ...] | None


class Programs:
    """The compiled programs of a run.

    Args:
        parts: Of the run.
        params: Parameters.
        opt_state: Optimizer state.
        due: From :func:`first_due`.

    Attributes:
        eval_step: From :func:`experiments.run.step.make_eval_step`.
        restart: :func:`experiments.model.adapters.restarted`.
        compile_seconds: For the steps of training and validation.
        compilations: Of the training step.
    """

    def __init__(
        self, parts: Parts, params: Any, opt_state: Any, due: Mapping[str, jax.Array]
    ):
        self._parts = parts
        config = parts.config
        method = OPTIMIZERS[config.optimizer]
        self._in_subspace = (
            config.gradients == "subspace" and method.takes_subspace_gradients
        )
        whole = NamedSharding(parts.mesh, PartitionSpec())
        self.restart = jax.jit(restarted, donate_argnums=(0, 1), out_shardings=whole)
        self.compile_seconds, self.compilations = 0.0, 0
        self.compile_train_steps(params, opt_state, due)
        started = time.monotonic()
        eval_step = make_eval_step(self._apply, parts.mesh)
        self.eval_step = eval_step.lower(params, self._abstract_batch()).compile()
        self.compile_seconds += time.monotonic() - started

    def compile_train_steps(
        self, params: Any, opt_state: Any, due: Mapping[str, jax.Array]
    ) -> None:
        """Compiles the step; with gradients in subspaces, those that renew bases too.

        Random bases need no full gradients, and none of those.
        """
        started = time.monotonic()
        kinds: list[Renewed] = [() if self._in_subspace else None]
        if self._in_subspace and due:
            apart = self._parts.config.refresh == "apart"
            kinds += [(path,) for path in due] if apart else [None]
        self._train_steps = {
            kind: self._compiled_step(kind, params, opt_state) for kind in kinds
        }
        self.compile_seconds += time.monotonic() - started
        self.compilations += 1

    def train_step(self, due: Mapping[str, jax.Array], step: int):
        """Returns the program of the next step; waits for what is due.

        Args:
            due: Which bases the step before has left to renew.
            step: Updates done.
        """
        if not self._in_subspace:
            return self._train_steps[None]
        return self._train_steps[bases_to_renew(due, step, self._parts.config.refresh)]

    def _compiled_step(self, renewed: Renewed, params: Any, opt_state: Any):
        parts = self._parts
        train_step = make_train_step(
            self._apply,
            parts.tx,
            parts.mesh,
            parts.config.accumulate,
            renewed=renewed,
        )
        return train_step.lower(params, opt_state, self._abstract_batch()).compile()

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        config = self._parts.config
        shape = (config.batch_size, config.sequence_length)
        return {name: jax.ShapeDtypeStruct(shape, t) for name, t in BATCH.items()}

    def _apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        return apply(self._parts.model, merged(params), tokens)


def first_due(parts: Parts, params: Any, opt_state: Any) -> dict[str, jax.Array]:
    """Returns which bases the first step has to renew, by key path."""
    gradient = lowrank_optax.subspace_value_and_grad(lambda: None, parts.tx)
    return jax.jit(gradient.due)(params, opt_state)


def bases_to_renew(due: Mapping[str, Any], step: int, refresh: str) -> Renewed:
    """Returns which leaves' bases the next step renews; None: all that are due.

    Args:
        due: Which leaves' are due, by key path.
        step: Updates done.
        refresh: The flag: ``together`` or ``apart``.
    """
    paths = [path for path, is_due in due.items() if is_due]
    if not paths:
        return ()
    if refresh == "together":
        return None
    # In turns, where more are due than there are steps.
    return (paths[step % len(paths)],)
