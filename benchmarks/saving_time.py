"""The training step while a checkpoint is written, beside the step without.

    python -m benchmarks.saving_time --model tiny --rounds 10

The parts are those of ``experiments.pretrain_llama``: its step without a renewal, its
checkpoints. A round times as many steps without a save as a save then lasts: the call
that copies the state is timed apart, then the steps until the checkpoint has its final
name. The ratio of a round is of the medians of its steps.
"""

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import environment
from experiments.distribution.placement import initial_state
from experiments.run.assemble import assemble
from experiments.run.checkpoint import Checkpoints, RunRecord
from experiments.run.compiled import Programs
from experiments.run.flags import Config
from experiments.run.memory import optimizer_state_bytes


def rounds(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the seconds of each round."""
    config = Config(
        model=options.model,
        optimizer=options.optimizer,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        out=directory / "run",
        compact=False,
    )
    parts = assemble(config, lambda line: None)
    params = parts.initial_params()
    _, shapes = parts.abstract_state()
    state = initial_state(parts.tx, params, jax.tree.map(lambda x: x.sharding, shapes))
    programs = Programs(parts, params, state)
    held = [params, state]
    del params, state
    with contextlib.closing(parts.work.train_iterator()) as batches:
        batch = next(batches)
        # Renews the bases that the first step has to have.
        *held[:], _ = programs.train_step(held[0], held[1], batch)

        def step() -> float:
            started = time.perf_counter()
            *held[:], metrics = programs.train_step(held[0], held[1], batch)
            jax.block_until_ready((held, metrics))
            return time.perf_counter() - started

        with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
            record = RunRecord({}, "", {}, {})
            for number in range(options.rounds + 1):
                found = _round(
                    step,
                    functools.partial(checkpoints.save, number + 1, run=record),
                    held,
                    directory / "checkpoints" / str(number + 1),
                )
                # The first round makes threads and directories.
                if number:
                    sizes = [optimizer_state_bytes(x) for x in held]
                    yield {**found, "bytes": sum(sizes)}


def _round(
    step: Callable[[], float], save: Callable[..., None], held: list[Any], name: Path
) -> dict[str, Any]:
    started = time.perf_counter()
    save(params=held[0], opt_state=held[1])
    copied = time.perf_counter() - started
    during = []
    while not name.exists():
        during.append(step())
    written = time.perf_counter() - started
    # Its checksums and the deletion of the one before are done by now, or soon.
    time.sleep(0.2)
    without = [step() for _ in range(max(3, len(during)))]
    return {
        "save_call_seconds": copied,
        "written_after_seconds": written,
        "steps_during": during,
        "steps_without": without,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving_time")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--optimizer", default="adarankgrad")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = list(rounds(options, Path(directory)))
    ratios = [
        statistics.median(x["steps_during"]) / statistics.median(x["steps_without"])
        for x in found
        if x["steps_during"]
    ]
    summary = {
        "ratio_median": statistics.median(ratios) if ratios else None,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "rounds_with_a_step_during": len(ratios),
        "save_call_seconds": statistics.median(x["save_call_seconds"] for x in found),
        "written_after_seconds": statistics.median(
            x["written_after_seconds"] for x in found
        ),
        "step_seconds": statistics.median(
            second for x in found for second in x["steps_without"]
        ),
    }
    fields = {k: v for k, v in vars(options).items() if k != "out"}
    record = {
        "environment": environment(),
        "options": fields,
        "summary": summary,
        "rounds": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
