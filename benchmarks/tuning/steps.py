"""Times the training steps of fine-tuning in turns, on one device.

    python -m benchmarks.tuning.steps --out steps.json --seconds 60

The step is the command's, without a renewal of bases: on a filled batch, whose tokens
all count. Peak: of the compiled step, as the compiler plans it. ``tokens_per_second``
is of whole batches.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax
from benchmarks.accelerator.filled import state_like, tokens
from benchmarks.accelerator.records import text_of
from benchmarks.accelerator.rounds import in_turns
from experiments.comparison.outcome import commit_of_code
from experiments.distribution.placement import shard_batch
from experiments.optim.methods import gradients_of
from experiments.run.memory import block_state, optimizer_state_bytes
from experiments.run.step import make_train_step
from experiments.tuning.assemble import assemble
from experiments.tuning.flags import TuningConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of batch, and the methods that are timed on it in turns.

    Attributes:
        name: Of the case.
        length: Tokens of every example.
        flags: Of every run.
        methods: Name -> flags of the method.
    """

    name: str
    length: int
    flags: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]


def _methods(rank: int) -> dict[str, dict[str, Any]]:
    full, subspace = {"gradients": "full"}, {"gradients": "subspace"}
    return {
        "adamw": {"optimizer": "adamw"},
        "lora": {"optimizer": "lora", "rank": rank},
        "galore, full gradients": {"optimizer": "galore", "rank": rank, **full},
        "galore, subspace gradients": {"optimizer": "galore", "rank": rank, **subspace},
        "adarankgrad, full gradients": {
            **{"optimizer": "adarankgrad", "rank": rank},
            **full,
        },
        "adarankgrad, subspace gradients": {
            **{"optimizer": "adarankgrad", "rank": rank},
            **subspace,
        },
        "low_rank_muon": {"optimizer": "low_rank_muon", "rank": rank},
    }


CASES = (
    Case(
        "MiniLM, 32 examples of 128 tokens, float32",
        128,
        {"model": "minilm", "task": "mrpc", "batch_size": 32},
        _methods(8),
    ),
    Case(
        "SmolLM2-135M, 16 examples of 512 tokens, bfloat16 activations",
        512,
        {
            **{"model": "smollm2", "task": "gsm8k", "batch_size": 16},
            **{"max_length": 512, "compute_dtype": "bfloat16"},
        },
        _methods(32),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.steps")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON")
    parser.add_argument("--data", type=Path, required=True, help="with glue and gsm8k")
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--tokens", type=int, help="of an example, for a quick look")
    parser.add_argument("--batch-size", type=int, help="likewise")
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    parser.add_argument("--minutes", type=float, default=8, help="to end within")
    parser.add_argument("--commit", help="to record; else git is asked")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "commit": options.commit or commit_of_code(),
        "cases": {},
    }
    for case in CASES:
        if case.flags["model"] not in options.models:
            continue
        if options.tokens:
            case = dataclasses.replace(case, length=options.tokens)
        if options.batch_size:
            flags = {**case.flags, "batch_size": options.batch_size}
            case = dataclasses.replace(case, flags=flags)
        found["cases"][case.name] = _measured(case, options, end)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _measured(case: Case, options: argparse.Namespace, end: float) -> dict[str, Any]:
    folder = options.data / ("gsm8k" if case.flags["task"] == "gsm8k" else "glue")
    names = ["mrpc_train", "mrpc_validation"]
    if folder.name == "gsm8k":
        names = ["train", "test"]
    train, validation = (str(folder / f"{name}.jsonl.gz") for name in names)
    rows: dict[str, dict[str, Any]] = {}
    steps = {}
    for name, flags in case.methods.items():
        # What is compiled has to be timed too.
        if time.monotonic() > end - options.seconds:
            rows[name] = {"skipped": "no time was left"}
            continue
        try:
            started = time.monotonic()
            rows[name], steps[name] = _prepared(case, flags, train, validation)
            print(f"{name}: {time.monotonic() - started:.0f} s to compile", flush=True)
        except Exception as error:
            rows[name] = {"error": text_of(error)}
            print(f"{name}: {rows[name]['error']}", flush=True)
    for name, times in in_turns(steps, options.seconds).items():
        count = case.flags["batch_size"] * case.length
        rows[name]["milliseconds"] = times
        rows[name]["tokens_per_second"] = 1e3 * count / times["median"]
        print(case.name, name, json.dumps(rows[name]), flush=True)
    return rows


def _prepared(case: Case, flags, train: str, validation: str):
    config = TuningConfig(
        **case.flags,
        **flags,
        train=train,
        validation=validation,
        steps=1_000,
        out=Path(tempfile.mkdtemp()) / "run",
    )
    parts = assemble(config, lambda line: None)
    work = parts.work
    with contextlib.closing(work.train_iterator()) as batches:
        batch = {
            name: _filled(name, (x.shape[0], case.length)[: x.ndim], x.dtype)
            for name, x in next(batches).items()
        }
    params = parts.initial_params()
    state = jax.jit(functools.partial(state_like, parts.tx))(params, jnp.uint32(0))
    train_step = make_train_step(
        work.loss,
        parts.tx,
        gradients=gradients_of(config),
    )
    on_device = shard_batch(batch, parts.mesh)
    held = [params, train_step.state_of(params, state)]
    lowered = train_step.lower(*held, on_device, renews=False)
    program = lowered.compile()
    plan = lowrank_optax.memory_plan(parts.tx, *parts.abstract_state()[:1], program)
    row = {
        "peak_bytes": plan.compiled and plan.compiled["peak"],
        "state_bytes": optimizer_state_bytes(state),
        "block_state_bytes": optimizer_state_bytes(block_state(state)),
        "batch": {name: list(x.shape) for name, x in batch.items()},
    }

    def step():
        params, _, state, metrics, _ = program(held[0], (), held[1], on_device, ())
        held[:] = params, state
        return metrics

    step()
    return row, step


def _filled(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array of a batch in which every token counts."""
    if name in ("tokens", "inputs", "targets"):
        examples, length = shape
        return np.asarray(tokens((examples, length), 1_000))
    number = 1 if name in ("mask", "weights") else 0
    return np.full(shape, number, dtype)


if __name__ == "__main__":
    main()
