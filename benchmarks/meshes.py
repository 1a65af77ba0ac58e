"""Losses and bytes of runs over meshes, beside one device's.

``python -m benchmarks.meshes --save`` runs the experiment's command in a process per
mesh, with eight simulated devices on the CPU, and writes
``benchmarks/results/meshes.json``. Times are no result here: eight devices share the
cores.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness import RESULTS
from experiments.model.hugging_face import save_llama
from experiments.model.llama import init_params
from experiments.model.shape import preset

ROOT = Path(__file__).resolve().parent.parent
MESHES = (
    *("data=8", "data=4,fsdp=2", "data=2,fsdp=4", "fsdp=8"),
    "data=2,fsdp=2,tensor=2",
)
METHODS = ("adamw", "adarankgrad", "sumo", "low_rank_muon", "projfactor")
FILE = RESULTS / "meshes.json"
DEVICES = 8
VOCABULARY = 257  # bytes, and the end of a text


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields what each run says of itself at its end."""
    for method in arguments.methods:
        for mesh in (None, *MESHES):
            yield run(method, mesh, arguments)


def run(
    method: str,
    mesh: str | None,
    arguments: argparse.Namespace,
    noise: float | None = None,
) -> dict[str, Any]:
    """Returns what a run says of itself at its end.

    Args:
        method: The optimizer.
        mesh: The mesh; None: one device.
        arguments: Of the command.
        noise: Relative size of a change of initial weights that are written down for
            the run; None: they are drawn by the run.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        words = [
            *_model(arguments, Path(directory), noise),
            *("--optimizer", method, "--out", str(out)),
            *("--steps", str(arguments.steps), "--eval-every", "100000"),
            *("--eval-tokens", "4096", "--sample-tokens", "0"),
            *(["--mesh", mesh] if mesh else []),
            *arguments.flags,
        ]
        devices = DEVICES if mesh else 1
        subprocess.run(
            [sys.executable, "-m", "experiments.pretrain_llama", *words],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            },
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = [json.loads(x) for x in (out / "metrics.jsonl").open()]
        summary = json.loads((out / "summary.json").read_text())
    return {
        "model": _name(arguments),
        "flags": arguments.flags,
        "optimizer": method,
        "mesh": mesh,
        "step": lines[-1]["step"],
        "loss": lines[-1]["loss"],
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "validation_loss": lines[-1]["validation_loss"],
        "bytes_per_device": summary["bytes_per_device"],
    }


def _model(
    arguments: argparse.Namespace, directory: Path, noise: float | None
) -> list[str]:
    """Returns the flags of the model; one that is no preset is written down first."""
    if arguments.layers is None and noise is None:
        return ["--model", arguments.model]
    layers = {} if arguments.layers is None else {"num_layers": arguments.layers}
    model = preset(arguments.model, VOCABULARY, **layers)
    params = jax.tree.map(np.asarray, init_params(model, jax.random.key(0)))
    draws = np.random.default_rng(0)

    def changed(x):
        return x * (1 + (noise or 0.0) * draws.standard_normal(x.shape, np.float32))

    save_llama(directory / "model", model, jax.tree.map(changed, params))
    return ["--initial-weights", str(directory / "model")]


def _name(arguments: argparse.Namespace) -> str:
    layers = arguments.layers
    return arguments.model if layers is None else f"{arguments.model}, {layers} layers"


def table(found: list[dict[str, Any]]) -> str:
    """Returns the runs as a table, each beside one device's of the same kind."""
    lines = [
        "| model | optimizer | mesh | loss | against one device | parameters | state |",
        "|---|---|---|---|---|---|---|",
    ]
    key = lambda row: (row["model"], row["optimizer"])  # noqa: E731
    for _, group in itertools.groupby(found, key):
        one, *others = group
        for row in (one, *others):
            relative = row["loss"] / one["loss"] - 1
            shares = [
                f"{row['bytes_per_device'][name] / one['bytes_per_device'][name]:.3f}"
                for name in ("parameters", "optimizer_state")
            ]
            lines.append(
                f"| {row['model']} | {row['optimizer']} | {row['mesh'] or 'one device'}"
                f" | {row['loss']:.6f} | {relative:+.1e} | {' | '.join(shares)} |"
            )
    return "\n".join(lines)


def arguments_of(description: str | None) -> argparse.Namespace:
    """Returns the arguments of a command that calls :func:`run`, on the CPU.

    Args:
        description: Docstring of its module.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", type=int, help="fewer than the model's own")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    jax.config.update("jax_platforms", "cpu")
    return parser.parse_args()


def main() -> None:
    """Runs, prints the table, and writes it if asked to."""
    arguments = arguments_of(__doc__)
    known = json.loads(FILE.read_text()) if arguments.save and FILE.exists() else []
    found = []
    for row in rows(arguments):
        found.append(row)
        print(table(found).splitlines()[-1], flush=True)
        if arguments.save:
            kept = [x for x in known if not any(map(_same(x), found))]
            FILE.write_text(json.dumps([*kept, *found], indent=1) + "\n")


def _same(row: dict[str, Any]):
    names = ("model", "flags", "optimizer", "mesh")
    return lambda other: all(row[x] == other[x] for x in names)


if __name__ == "__main__":
    main()
