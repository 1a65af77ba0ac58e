"""Runs of one method, side by side in one program."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.together.texts import Texts
from experiments.comparison.flags import fields_of, resolved
from experiments.comparison.suite import Contender, Suite
from experiments.model.adapters import adapted, merged
from experiments.model.llama import apply, init_params
from experiments.optim.build import build_optimizer
from experiments.optim.methods import gradients_of
from experiments.optim.schedule import make_schedule
from experiments.run.config import complete
from experiments.run.memory import (
    adamw_state_bytes,
    block_leaves,
    block_state,
    optimizer_state_bytes,
)
from experiments.run.model_shape import model_of, parameterised
from experiments.run.step import BATCH, make_train_step, summed_token_loss

# Most steps of one call of the program, between two looks at the clock.
_MOST = 50


class Late(Exception):
    """The time is over."""


class Run(NamedTuple):
    """One run.

    Attributes:
        rates: Learning rates of the rest and of the blocks.
        stream: Number of its text and seed.
    """

    rates: tuple[float, float]
    stream: int


class Together:
    """A method, ready to train several runs at once.

    Args:
        suite: The suite. A validation comes at its end, and every ``eval_every``
            steps, which divide its steps.
        contender: The method.
        texts: Batches of all streams.
        width: Runs of a program. Fewer are filled up with repetitions.
        deadline: Time of ``time.monotonic`` after which runs end with :class:`Late`.
        turn: Held while runs train: one process at a time uses the accelerator.
    """

    def __init__(
        self,
        suite: Suite,
        contender: Contender,
        texts: Texts,
        width: int,
        deadline: float,
        turn: AbstractContextManager[Any],
    ):
        self._contender, self._texts, self._width = contender, texts, width
        self._deadline, self._turn = deadline, turn
        fields = fields_of(contender, suite)
        options = suite.trainer.settings.options(**fields)
        size = texts.vocab_size
        self._model = model_of(options, size, None)
        self._config = complete(options, self._model.hidden_size)
        self._flags = resolved(contender, suite)
        self.steps = self._config.steps
        if self.steps > texts.tokens.shape[1]:
            raise ValueError(
                f"{self.steps} steps, and {texts.tokens.shape[1]} are written down; "
                "write down more of them (benchmarks.together.texts --steps)."
            )
        between = math.gcd(self.steps, self._config.eval_every)
        self._chunk_size = max(n for n in range(1, _MOST + 1) if between % n == 0)

    def key(self, run: Run) -> dict[str, Any]:
        """Returns the entries that tell the record of one run from those of others."""
        text, seed = self._texts.streams[run.stream]
        return {
            "method": self._contender.name,
            "flags": self._flags,
            "text": text,
            "learning_rate": run.rates[0],
            "block_learning_rate": run.rates[1],
            "seed": seed,
            "steps": self.steps,
            "model": self._config.model,
        }

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Trains the runs; returns the other entries of their records.

        Args:
            runs: At most ``width``.

        Raises:
            Late: At the deadline.
        """
        filled = [*runs, *[runs[-1]] * (self._width - len(runs))]
        rates = jnp.asarray([run.rates for run in filled], jnp.float32)
        streams = np.asarray([run.stream for run in filled])
        seeds = jnp.asarray([self._texts.streams[i][1] for i in streams], jnp.uint32)
        given = (rates, seeds, jnp.asarray(streams, jnp.int32))
        init, chunk, evaluate = self._programs
        with self._turn:
            started = time.monotonic()
            params, state = init(*given)
            first = np.asarray(self._losses(evaluate, params, streams))
            curve = []
            size = self._chunk_size
            for start in range(0, self.steps, size):
                params, state, ranks = chunk(params, state, jnp.int32(start), *given)
                # Of what waits in a queue the clock knows nothing.
                jax.block_until_ready(ranks)
                if time.monotonic() > self._deadline:
                    raise Late
                if (start + size) % self._config.eval_every == 0:
                    curve.append(self._losses(evaluate, params, streams))
            last = np.asarray(curve[-1])
            seconds = time.monotonic() - started
            ranks = np.asarray(ranks)
        found = []
        shapes = self._shapes(params, state)
        for i, _ in enumerate(runs):
            learned = np.isfinite(last[i]) and last[i] < first[i]
            found.append(
                {
                    "status": "finished" if learned else "diverged",
                    "step": self.steps,
                    "validation_loss": float(last[i]),
                    "initial_validation_loss": float(first[i]),
                    "tokens": self.steps * self._config.batch_size * self._length,
                    "seconds_of_all": seconds,
                    "runs_at_once": self._width,
                    "validation_curve": [float(x[i]) for x in map(np.asarray, curve)],
                    "mean_rank": float(np.mean(ranks[i])) if ranks.shape[-1] else None,
                    "data": self._texts.data[self._texts.text[streams[i]]],
                    **shapes,
                }
            )
        return found

    @property
    def _length(self) -> int:
        return self._config.sequence_length

    def _shapes(self, params: Any, state: Any) -> dict[str, Any]:
        """Returns sizes of one run of those that are side by side."""
        params, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
            (params, state.optimizer),
        )
        model = jax.eval_shape(merged, params)
        device = jax.devices()[0]
        return {
            "optimizer_state_bytes": optimizer_state_bytes(state),
            "adamw_state_bytes": adamw_state_bytes(model),
            "block_state_bytes": optimizer_state_bytes(block_state(state)),
            "block_adamw_state_bytes": adamw_state_bytes(block_leaves(model)),
            "device": f"1 x {device.platform} ({device.device_kind})",
        }

    @functools.cached_property
    def _data(self) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        texts = self._texts
        validation = {k: jnp.asarray(x) for k, x in texts.validation.items()}
        return (jnp.asarray(texts.tokens), jnp.asarray(texts.weights)), validation

    @functools.cached_property
    def _programs(self):
        """The compiled programs: initial state, some steps, validation."""
        shapes = (((self._width, 2), jnp.float32), ((self._width,), jnp.uint32))
        given = [
            jax.ShapeDtypeStruct(*x) for x in (*shapes, ((self._width,), jnp.int32))
        ]
        params, state = jax.eval_shape(self._init, *given)
        train, validation = self._data
        chunk = jax.jit(self._chunk, donate_argnums=(0, 1))
        chunk = chunk.lower(params, state, jnp.int32(0), *given, train).compile()
        evaluate = (
            jax.jit(self._evaluate).lower(params, given[-1], validation).compile()
        )
        return (
            jax.jit(self._init).lower(*given).compile(),
            lambda *args: chunk(*args, train),
            lambda params, texts: evaluate(params, texts, validation),
        )

    def _losses(self, evaluate, params, streams) -> jax.Array:
        texts = np.asarray(self._texts.text, np.int32)[streams]
        return evaluate(params, jnp.asarray(texts))

    def _step(self, rates: Any, seed: Any):
        config = self._config
        unit = make_schedule(
            dataclasses.replace(config, learning_rate=1.0), config.steps
        )
        options = dataclasses.replace(config, block_scale=rates[1] / rates[0])
        tx = build_optimizer(options, lambda count: rates[0] * unit(count), seed)
        return make_train_step(
            self._loss, tx, gradients=gradients_of(config), refresh=config.refresh
        )

    def _loss(self, params: Any, batch: Any):
        def logits(params, tokens):
            return apply(self._model, adapted(params), tokens)

        return summed_token_loss(logits, params, batch)

    def _init(self, rates, seeds, streams):
        del streams

        def one(rates, seed):
            key = jax.random.key(seed)
            params = parameterised(init_params(self._model, key), self._config, key)
            step = self._step(rates, seed)
            return params, step.state_of(params, step.optimizer.init(params))

        return jax.vmap(one)(rates, seeds)

    def _chunk(self, params, state, start, rates, seeds, streams, train):
        size = self._chunk_size

        def next_batches(x, dtype):
            some = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
            return jnp.moveaxis(some, 1, 0).astype(dtype)

        tokens, weights = train
        train = next_batches(tokens, jnp.int32), next_batches(weights, jnp.float32)

        def all_runs(renews, params, state, tokens, weights):
            def one(params, state, tokens, weights, rates, seed):
                arrays = (tokens[:, :-1], tokens[:, 1:], weights)
                run = self._step(rates, seed).function(renews=renews)
                return run(params, state, dict(zip(BATCH, arrays, strict=True)))

            return jax.vmap(one)(params, state, tokens, weights, rates, seeds)

        def body(carry, batches):
            params, state = carry
            args = (params, state, *(x[streams] for x in batches))
            renewing = functools.partial(all_runs, True)
            keeping = functools.partial(all_runs, False)
            if state.due.shape[-1]:
                due = jnp.any(state.due[:, 0] > 0)
                params, state, metrics = jax.lax.cond(due, renewing, keeping, *args)
            else:
                params, state, metrics = keeping(*args)
            return (params, state), metrics["ranks"]

        (params, state), ranks = jax.lax.scan(body, (params, state), train)
        return params, state, ranks[-1]

    def _evaluate(self, params, texts, validation):
        def add(sums, batch):
            def one(params, text):
                own = {k: batch[k][text].astype(dtype) for k, dtype in BATCH.items()}
                return jnp.stack(self._loss(params, own))

            return sums + jax.vmap(one)(params, texts), None

        batches = {name: jnp.moveaxis(x, 1, 0) for name, x in validation.items()}
        sums, _ = jax.lax.scan(add, jnp.zeros([self._width, 2]), batches)
        return sums[:, 0] / sums[:, 1]
