"""Validation loss against bytes of optimizer state, of finished runs of the experiment.

    python -m benchmarks.pareto NAME runs/a runs/b ...

The command writes the rows as JSON, and a figure with the Pareto front, to
benchmarks/results/. Runs that differ in their seed alone make a single row.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness
from experiments.comparison.rows import front
from experiments.run.config import PRETRAINING

# The parts of a row's label, and their words.
_OPTIONS = {
    "rank": "r={}",
    "granularity": "c={}",
    "moment_bits": "{} bits",
    "basis_bits": "basis {}",
    "vocabulary_optimizer": "vocabulary {}",
    "param_dtype": "{}",
    "rounding": "{}",
}
_DEFAULTS = {
    "vocabulary_optimizer": "adamw",
    "rounding": "stochastic",
    "param_dtype": "float32",
}


def label(config: dict[str, Any]) -> str:
    """Returns a description of a run's optimizer and state."""
    words = [config["optimizer"]]
    for name, text in _OPTIONS.items():
        value = config.get(name)
        is_plain = name == "rounding" and config.get("param_dtype") != "bfloat16"
        if value is not None and value != _DEFAULTS.get(name) and not is_plain:
            words.append(text.format(value))
    return ", ".join(words)


def read(directories: list[Path]) -> list[dict[str, Any]]:
    """Returns a row for each configuration, over its seeds, without diverged runs."""
    free = PRETRAINING.free - {"eval_tokens"} | {"seed"}
    groups: dict[str, list[tuple[dict, dict]]] = {}
    for directory in directories:
        config = json.loads((directory / "config.json").read_text())
        summary = json.loads((directory / "summary.json").read_text())
        if summary["validation_loss"] is None:
            print(f"{directory} diverged: left out")
            continue
        same = {k: v for k, v in config.items() if k not in free}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(
            (config, summary)
        )
    rows = []
    for runs in groups.values():
        losses = [summary["validation_loss"] for _, summary in runs]
        config, summary = runs[0]
        rows.append(
            {
                "model": summary["model"],
                "optimizer": label(config),
                "steps": config["steps"],
                "learning_rate": config["learning_rate"],
                "block_scale": config["block_scale"],
                "seeds": [config["seed"] for config, _ in runs],
                "validation_losses": losses,
                "mean_loss": statistics.mean(losses),
                "optimizer_state_bytes": summary["optimizer_state_bytes"],
                "of_adamw": summary["optimizer_state_bytes"]
                / _adamw_bytes(summary["parameter_count"]),
            }
        )
    return sorted(rows, key=lambda row: (row["model"], row["optimizer_state_bytes"]))


def _adamw_bytes(parameters: int) -> int:
    """Returns the bytes of AdamW's state for float32 parameters."""
    return 8 * parameters


def _front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return front(rows, lambda row: (row["optimizer_state_bytes"], row["mean_loss"]))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws one panel per model."""
    models = sorted({row["model"] for row in rows})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models, strict=True
    ):
        mine = [row for row in rows if row["model"] == model]
        for row in mine:
            x = row["of_adamw"]
            axes.plot(
                [x] * len(row["validation_losses"]),
                row["validation_losses"],
                ".",
                color="0.6",
            )
            axes.plot(x, row["mean_loss"], "o", color="C0")
        ahead = _front(mine)
        axes.step(
            [row["of_adamw"] for row in ahead],
            [row["mean_loss"] for row in ahead],
            where="post",
            color="C1",
            label="Pareto front",
        )
        for row in ahead:
            axes.annotate(
                row["optimizer"],
                (row["of_adamw"], row["mean_loss"]),
                xytext=(5, -9),
                textcoords="offset points",
                fontsize=7,
            )
        axes.set_xscale("log")
        axes.set_xlabel("optimizer state, share of AdamW's bytes")
        axes.set_ylabel("validation loss, nats per token")
        axes.set_title(f"{model}, {mine[0]['steps']} steps")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the files in benchmarks/results/")
    parser.add_argument("runs", nargs="+", type=Path, help="--out of finished runs")
    arguments = parser.parse_args()
    rows = read(arguments.runs)
    for row in rows:
        losses = " ".join(f"{x:.4f}" for x in row["validation_losses"])
        is_ahead = row in _front([r for r in rows if r["model"] == row["model"]])
        size, rate = row["optimizer_state_bytes"], row["learning_rate"]
        print(
            f"| {row['model']} | {row['optimizer']} | {rate:g} x "
            f"{row['block_scale']:g} | {size:,} | {row['of_adamw']:.3f} | "
            f"{row['mean_loss']:.4f} | {losses} | {'front' if is_ahead else ''} |"
        )
    harness.save(arguments.name, {"rows": rows})
    draw(rows, harness.RESULTS / f"{arguments.name}.svg")


if __name__ == "__main__":
    main()
