"""Several seeds of one run: their directories, and mean and deviation at the end."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.distribution.processes import is_first, wait_for_all
from experiments.errors import UserError
from experiments.run.changes import changes, told
from experiments.run.files import CONFIG_FILE, SUMMARY_FILE, check_is_free, write_json
from experiments.run.parts import new_directory
from experiments.run.settings import to_json
from experiments.tuning.config import TUNING
from experiments.tuning.flags import TuningConfig

SEEDS_FILE = "seeds.json"


def begin(config: TuningConfig) -> tuple[Path, list[TuningConfig]]:
    """Begins, or goes on with, the runs of several seeds.

    Their directory has a config.json too, so that ``--out DIR --resume`` goes on with
    all of them. More seeds, and more steps, are allowed then.

    Returns:
        Their directory, and a configuration for each, with a directory inside.

    Raises:
        UserError: If the directory is a file, holds a single run, or runs of another
            configuration; if there is something, and no ``--resume``.
    """
    parent = config.out or new_directory(
        config.model_name, config.task, config.optimizer
    )
    if config.resume and (parent / CONFIG_FILE).is_file():
        _check_same(config, parent)
    elif not config.resume and any(parent.glob("seed-*/*")):
        raise UserError(
            f"--out {parent} holds other runs; continue them with --resume, or give "
            "another --out"
        )
    else:
        check_is_free(parent, resume=config.resume)
    if is_first():
        parent.mkdir(parents=True, exist_ok=True)
        write_json(parent / CONFIG_FILE, to_json(config))
    return parent, [
        dataclasses.replace(config, seed=seed, seeds=1, out=parent / f"seed-{seed}")
        for seed in range(config.seed, config.seed + config.seeds)
    ]


def _check_same(config: TuningConfig, parent: Path) -> None:
    saved = TUNING.read_file(parent / CONFIG_FILE)
    if saved.get("seeds") == 1:
        raise UserError(f"--out {parent} holds a single run; give another --out")
    found = changes(saved, config, TUNING)
    found = {k: v for k, v in found.items() if k not in ("seeds", "steps")}
    if found:
        raise UserError(
            f"the runs in {parent} have another configuration: {told(found)}; leave "
            "these flags out, or give a new --out without --resume"
        )


def is_finished(config: TuningConfig) -> bool:
    """Returns whether the run of a seed has done the steps that are asked for.

    Without ``--steps`` the data says how many these are: a finished run is then gone
    on with from its end.
    """
    assert config.out is not None
    path = config.out / SUMMARY_FILE
    return path.exists() and json.loads(path.read_text())["steps"] == config.steps


def wait_for_results(config: TuningConfig) -> None:
    """Waits for the results of a seed, which the first of several processes writes."""
    wait_for_all(f"seed {config.seed}")


def report(configs: list[TuningConfig], console: Console) -> None:
    """Writes seeds.json, and prints each seed, the mean and the deviation.

    The deviation is that of a sample, with n - 1. The first of several processes does
    it for all.

    Args:
        configs: Of finished runs, at least two.
        console: Where to print.
    """
    if not is_first():
        return
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


def _spread(values: list[float]) -> tuple[float, float]:
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


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
