"""Several seeds of one run: their directories, and mean and deviation at the end."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.errors import UserError
from experiments.run.files import SUMMARY_FILE, write_json
from experiments.run.parts import new_directory
from experiments.tuning.flags import TuningConfig

SEEDS_FILE = "seeds.json"


def configs_of(config: TuningConfig) -> list[TuningConfig]:
    """Returns the configurations of the runs of all seeds, each with its directory.

    Raises:
        UserError: If the directory is a file, or holds a single run.
    """
    parent = config.out or new_directory(
        config.model_name, config.task, config.optimizer
    )
    if parent.is_file():
        raise UserError(f"--out {parent} is a file; give a directory")
    if (parent / SUMMARY_FILE).exists():
        raise UserError(f"--out {parent} holds a single run; give another --out")
    return [
        dataclasses.replace(config, seed=seed, seeds=1, out=parent / f"seed-{seed}")
        for seed in range(config.seed, config.seed + config.seeds)
    ]


def is_finished(config: TuningConfig) -> bool:
    """Returns whether the run of a seed is done."""
    return config.out is not None and (config.out / SUMMARY_FILE).exists()


def report(configs: list[TuningConfig], console: Console) -> dict[str, Any]:
    """Writes seeds.json, and prints each seed, the mean and the deviation.

    The deviation is that of a sample, with n - 1.

    Args:
        configs: Of finished runs, at least two.
        console: Where to print.

    Returns:
        What seeds.json holds.
    """
    directories = [config.out for config in configs if config.out is not None]
    found = [json.loads((x / SUMMARY_FILE).read_text()) for x in directories]
    names = ("last_metric", "best_metric", "validation_loss")
    statistics_ = {
        name: _spread([x[name] for x in found if x[name] is not None]) for name in names
    }
    whole = {
        "metric": found[0]["metric"],
        "seeds": [config.seed for config in configs],
        **{name: [x[name] for x in found] for name in names},
        "mean": {name: mean for name, (mean, _) in statistics_.items()},
        "deviation": {name: deviation for name, (_, deviation) in statistics_.items()},
    }
    write_json(directories[0].parent / SEEDS_FILE, whole)
    _print(whole, directories[0].parent, console)
    return whole


def _spread(values: list[float]) -> tuple[float, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), deviation


def _print(whole: dict[str, Any], directory: Path, console: Console) -> None:
    metric = whole["metric"].replace("_", " ")
    table = Table(title=f"{len(whole['seeds'])} seeds")
    columns = {
        "last_metric": f"{metric}, last",
        "best_metric": f"{metric}, best",
        "validation_loss": "loss, last",
    }
    for title in ("seed", *columns.values()):
        table.add_column(title, justify="right")
    for row in _rows(whole, tuple(columns)):
        table.add_row(*row)
    console.print(table)
    console.print(f"results in {directory}", soft_wrap=True, highlight=False)


def _rows(whole: dict[str, Any], names: tuple[str, ...]) -> Iterator[list[str]]:
    for i, seed in enumerate(whole["seeds"]):
        yield [str(seed), *(_number(whole[name][i]) for name in names)]
    for row in ("mean", "deviation"):
        yield [row, *(_number(whole[row][name]) for name in names)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
