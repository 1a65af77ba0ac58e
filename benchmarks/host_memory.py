"""The training step with the optimizer's state in the host's memory, or the device's.

    python -m benchmarks.host_memory --model 350m --optimizers adamw adarankgrad

The step is the experiment's, without a renewal of bases, in bfloat16 with recomputed
layers. Both kinds of each optimizer are timed in turns in one process. Bytes: of the
compiled step, as the compiler plans it; and the device's peak in a process of its own,
whose arrays are made leaf by leaf, so that nothing but the step makes the peak.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_optax
from benchmarks.accelerator import filled
from benchmarks.accelerator.records import text_of
from benchmarks.accelerator.rounds import in_turns
from benchmarks.harness import environment
from experiments.distribution.host_memory import PINNED, in_host_memory
from experiments.distribution.mesh import mesh_of_one
from experiments.distribution.rules import (
    bytes_per_device,
    on_mesh,
    parameter_shardings,
    placed_shapes,
)
from experiments.model.llama import apply
from experiments.model.shape import preset
from experiments.optim.methods import OPTIMIZERS, gradients_of
from experiments.run.flags import Config
from experiments.run.plans import shapes_of
from experiments.run.step import make_train_step, summed_token_loss

KINDS = ("device", PINNED)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step with arrays for it; calling it makes the next step."""

    program: Any
    held: list[Any]
    batch: Mapping[str, jax.Array]
    row: dict[str, Any]

    def __call__(self) -> Any:
        """Makes the next step; returns its loss, not waited for."""
        params, state = self.held
        params, _, state, metrics, _ = self.program(params, (), state, self.batch, ())
        self.held[:] = params, state
        return metrics["loss"]


def prepared(optimizer: str, kind: str, options: argparse.Namespace) -> Step:
    """Compiles a step, and fills its arrays; its row has what was planned.

    Args:
        optimizer: Name of one of the experiment's.
        kind: One of :data:`KINDS`.
        options: Of the command.
    """
    config = Config(
        model=options.model,
        optimizer=optimizer,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        param_dtype=options.dtype,
        rank=options.rank if "rank" in OPTIMIZERS[optimizer].own else None,
    )
    model = preset(
        options.model,
        options.vocabulary,
        remat=True,
        compute_dtype=options.dtype,
        param_dtype=options.dtype,
    )
    config, tx, shapes = shapes_of(config, model)
    mesh = mesh_of_one()
    params, state = placed_shapes(
        tx, on_mesh(shapes, parameter_shardings(shapes, mesh))
    )
    if kind == PINNED:
        state = in_host_memory(state)
    step = make_train_step(
        functools.partial(summed_token_loss, functools.partial(apply, model)),
        tx,
        gradients=gradients_of(config),
    )
    state = step.state_of(params, state)
    shape = (options.batch_size, options.sequence_length)
    tokens = filled.tokens(shape, options.vocabulary)
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "weights": jnp.ones(shape, jnp.float32),
    }
    started = time.monotonic()
    program = step.lower(params, state, batch, renews=False).compile()
    plan = lowrank_optax.memory_plan(tx, params, program).compiled
    row = {
        "compile_seconds": time.monotonic() - started,
        "planned_bytes": plan,
        "state_bytes": bytes_per_device(state.optimizer),
    }
    return Step(program, [_filled(params), _filled(state)], batch, row)


def _filled(shapes: Any) -> Any:
    """Returns arrays with small numbers, each where its shape says, one by one."""

    def of_leaf(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
            make = functools.partial(_ones, x)
        else:
            make = functools.partial(_noise, x, len(jax.tree_util.keystr(path)))
        kind = x.sharding.with_memory_kind("device")
        array = jax.block_until_ready(jax.jit(make, out_shardings=kind)())
        return jax.block_until_ready(jax.device_put(array, x.sharding))

    return jax.tree_util.tree_map_with_path(of_leaf, shapes)


def _ones(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), x.shape)
    return jnp.ones(x.shape, x.dtype)


def _noise(x: Any, seed: int) -> jax.Array:
    return (0.02 * jnp.abs(filled.noise(x.shape, seed))).astype(x.dtype)


def _peak(optimizer: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a step, run three times in this new process."""
    step = prepared(optimizer, kind, options)
    for _ in range(3):
        jax.block_until_ready(step())
    statistics = jax.local_devices()[0].memory_stats() or {}
    return {**step.row, "device_peak_bytes": statistics.get("peak_bytes_in_use")}


def main() -> None:
    """Measures, prints and writes after each optimizer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_memory")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON")
    parser.add_argument("--model", default="350m")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adarankgrad"])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=10, help="of both kinds")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    # A device's peak is that of a process.
    context = multiprocessing.get_context("spawn")
    for name in options.optimizers:
        rows: dict[str, Any] = {}
        for kind in KINDS:
            with context.Pool(1) as pool:
                try:
                    rows[kind] = pool.apply(_peak, (name, kind, options))
                except Exception as error:
                    rows[kind] = {"error": text_of(error)}
            print(name, kind, json.dumps(rows[kind]), flush=True)
        found[name] = rows
        with context.Pool(1) as pool:
            try:
                rows["milliseconds"] = pool.apply(_timed, (name, options))
            except Exception as error:
                rows["error"] = text_of(error)
        print(name, json.dumps(rows.get("milliseconds")), flush=True)
        _write(options, found)


def _timed(optimizer: str, options: argparse.Namespace) -> dict[str, Any]:
    steps = {kind: prepared(optimizer, kind, options) for kind in KINDS}
    for step in steps.values():
        jax.block_until_ready(step())
    return {**in_turns(steps, options.seconds), "environment": environment()}


def _write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    fields = {k: v for k, v in vars(options).items() if k not in ("out", "optimizers")}
    options.out.write_text(
        json.dumps({"options": fields, "rows": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
