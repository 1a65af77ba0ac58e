"""The runs of one method on one task: one program for all rates and seeds."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax
from experiments.comparison.flags import fields_of, resolved
from experiments.comparison.suite import Contender, Suite
from experiments.model.adapters import merged
from experiments.optim.build import build_optimizer
from experiments.optim.compaction import LOOKS, Compaction
from experiments.optim.schedule import make_schedule
from experiments.run.columns import ranks_by_name
from experiments.run.effective_rank import RankSums, effective_ranks
from experiments.run.memory import (
    adamw_state_bytes,
    block_leaves,
    block_state,
    optimizer_state_bytes,
)
from experiments.run.parts import Parts
from experiments.run.step import make_train_step, mean_loss
from experiments.tuning.assemble import assemble
from experiments.tuning.frozen import groups_of

Rates = tuple[float, float]

# Steps between two lines of ranks.
_EVERY = 10


class Late(Exception):
    """The time is over."""


class Method:
    """A method on a task, ready to run with any rates and any seed.

    Args:
        suite: The suite of one task.
        contender: The method.
        data: The flags that say what is trained on.
        deadline: Time of ``time.monotonic`` after which runs end with :class:`Late`.
        turn: Held while a run trains: of the processes that share the accelerator, one
            uses it at a time. On an H200 300 steps took 60 s where 15 processes shared
            it, and 20 s where 4 did.
    """

    def __init__(
        self,
        suite: Suite,
        contender: Contender,
        data: Mapping[str, Any],
        deadline: float,
        turn: AbstractContextManager[Any],
    ):
        self._turn = turn
        self._suite, self._contender, self._deadline = suite, contender, deadline
        self._data = {k: v for k, v in data.items() if v is not None}
        self._parts = functools.cache(self._assembled)
        parts = self._parts(suite.seeds[0])
        self._length = parts.work.data.bucket_lengths[-1]
        self._step = jax.jit(self._traced_step, donate_argnums=(0, 1))
        self._evaluate = jax.jit(parts.work.evaluate)
        self._init = jax.jit(self._traced_init)
        self._compiled: Any = None

    def key(self, rates: Rates, seed: int) -> dict[str, Any]:
        """Returns the entries that tell the record of one run from those of others."""
        return {
            "method": self._contender.name,
            "flags": resolved(self._contender, self._suite),
            "learning_rate": rates[0],
            "block_learning_rate": rates[1],
            "seed": seed,
            "steps": self._parts(self._suite.seeds[0]).config.steps,
        }

    def run(self, rates: Rates, seed: int) -> dict[str, Any]:
        """Trains; returns the other entries of its record.

        Raises:
            Late: At the deadline.
        """
        parts = self._parts(seed)
        traced = (jnp.asarray(rates, jnp.float32), jnp.uint32(seed))
        params = parts.initial_params()
        state = self._init(params, *traced)
        if self._compiled is None:
            batch = next(self._batches(parts))
            self._compiled = self._step.lower(params, state, batch, *traced).compile()
            # Compiled before its turn, as the step is.
            self._evaluate(params, batch)
        with self._turn:
            return self._trained(parts, params, state, traced)

    def _trained(self, parts, params, state, traced) -> dict[str, Any]:
        config, work = parts.config, parts.work
        sums, ranks, curve, rank_lines = RankSums(), [], [], []
        step, tokens, seconds, found, metrics = 0, 0, 0.0, {}, {}
        compaction, compacted = Compaction(), None
        looks = range(config.steps, 0, -config.compact_every)[:LOOKS]
        started = time.monotonic()
        for step, batch in enumerate(self._batches(parts), 1):
            params, state, metrics = self._compiled(params, state, batch, *traced)
            ranks.append(metrics["ranks"])
            tokens += work.tokens_of(batch)
            if config.compact and step in looks:
                compacted = compaction.look(state, False, config.most_columns)
            if step % config.eval_every and step != config.steps:
                continue
            jax.block_until_ready(params)
            seconds += time.monotonic() - started
            for number, x in enumerate(map(np.asarray, ranks), step - len(ranks) + 1):
                sums.add(x)
                if number % _EVERY == 0 and len(x):
                    rank_lines.append((number, x.tolist()))
            ranks = []
            if time.monotonic() > self._deadline:
                raise Late
            if int(metrics["rejected_in_a_row"]):
                break
            found = self._validated(parts, params)
            curve.append((tokens, seconds, found[self._suite.measure.line]))
            started = time.monotonic()
        ended = step == config.steps and not int(metrics["rejected_in_a_row"])
        ended = ended and np.isfinite(found["validation_loss"])
        summary = {}
        if ended:
            summary = self._summary(parts, params, compacted or state, sums, found)
        return {
            "status": "finished" if ended else "diverged",
            "step": step,
            **summary,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / step,
            "training_seconds": seconds,
            "validation_curve": curve,
            "rank_curve": [(i, round(float(np.mean(x)), 2)) for i, x in rank_lines],
            "rank_lines": rank_lines,
        }

    def _assembled(self, seed: int) -> Parts[Any]:
        fields = {
            **fields_of(self._contender, self._suite),
            **self._data,
            "learning_rate": self._contender.learning_rate,
            "block_scale": self._contender.block_scale,
            "seed": seed,
            "out": Path(tempfile.mkdtemp()) / "run",
        }
        config = self._suite.trainer.settings.options(**fields)
        return assemble(config, lambda line: None)

    def _tx(self, rates: Any, seed: Any):
        parts = self._parts(self._suite.seeds[0])
        config = parts.config
        options = dataclasses.replace(config, learning_rate=1.0)
        unit = make_schedule(options, config.steps)
        options = dataclasses.replace(config, block_scale=rates[1] / rates[0])

        def schedule(count):
            return rates[0] * unit(count)

        return build_optimizer(
            options,
            schedule,
            seed,
            head_schedule=None if parts.work.task.kind == "answer" else schedule,
            groups_of=functools.partial(groups_of, config),
        )

    def _traced_init(self, params, rates, seed):
        return self._tx(rates, seed).init(params)

    def _traced_step(self, params, state, batch, rates, seed):
        parts = self._parts(self._suite.seeds[0])
        config = dataclasses.replace(parts.config, seed=seed)
        work = dataclasses.replace(parts.work, config=config)
        step = make_train_step(work.loss, self._tx(rates, seed))
        state = step.state_of(params, state)
        run = step.function(renews=True)
        params, state, metrics = run(params, state, batch)
        return params, state.optimizer, metrics

    def _batches(self, parts: Parts[Any]) -> Iterator[Mapping[str, Any]]:
        iterator = parts.work.train_iterator()
        try:
            for _ in range(parts.config.steps):
                yield self._padded(next(iterator))
        finally:
            iterator.close()

    def _padded(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch of the longest bucket; what is added has no weight."""
        parts = self._parts(self._suite.seeds[0])
        filling = {"tokens": getattr(parts.work.model, "padding_id", 0)}
        padded = {}
        for name, x in batch.items():
            if x.ndim == 2:
                added = ((0, 0), (0, self._length - x.shape[1]))
                x = np.pad(x, added, constant_values=filling.get(name, 0))
            padded[name] = x
        return padded

    def _validated(self, parts: Parts[Any], params: Any) -> dict[str, Any]:
        work = parts.work

        def evaluate(batch):
            return self._evaluate(params, self._padded(batch))

        if work.task.kind != "answer":
            return work.validate(params, evaluate)
        # The loss alone: problems are not answered.
        batches = work.data.batches(work.data.splits[0])
        return {"validation_loss": mean_loss(map(evaluate, batches))}

    def _summary(self, parts, params, state, sums, found) -> dict[str, Any]:
        config, work = parts.config, parts.work
        shapes = jax.eval_shape(lambda x: x, params)
        plan = lowrank_optax.memory_plan(parts.tx, shapes, self._compiled).compiled
        device = jax.devices()[0]
        model = jax.eval_shape(merged, shapes)
        metrics = found.get("validation_metrics", {})
        ranks = effective_ranks(sums, state, shapes, config.rank)
        return {
            "task": config.task,
            "model": config.model_name,
            "epoch": work.epochs(config.steps),
            "metric": next(iter(metrics), None),
            "last_metric": found.get("validation_metric"),
            "last_metrics": metrics,
            "validation_loss": found["validation_loss"],
            "step_peak_bytes": plan and plan["peak"],
            "last_ranks": ranks_by_name(state),
            "mean_ranks": ranks["effective_rank_by_layer"],
            **ranks,
            "optimizer_state_bytes": optimizer_state_bytes(state),
            "adamw_state_bytes": adamw_state_bytes(model),
            "block_state_bytes": optimizer_state_bytes(block_state(state)),
            "block_adamw_state_bytes": adamw_state_bytes(block_leaves(model)),
            "data": work.data.description,
            "device": f"{device.platform}: {device.device_kind}",
        }
