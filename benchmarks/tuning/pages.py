"""The tables of the page about fine-tuning, from ``benchmarks/results/``."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.comparison.rows import Row, rows_of
from experiments.comparison.suites import SUITES
from experiments.comparison.tuning_report import last
from experiments.run.files import read_lines

# The time on the accelerator was in parts.
_PARTS = ("second", "third", "fourth")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
H200 = tuple(f"tuning-h200/{name}" for name in ("glue", *map("glue-{}".format, _PARTS)))
ANSWERS = ("tuning-h200/smollm2", "tuning-h200/smollm2-second")
CPU = ("tuning-cpu/threshold",)
# Seeds that the time on the accelerator did not reach, behind its own.
GLUE = (*H200, "tuning-cpu/glue")

Rows = Iterator[list[str]]


def tasks() -> Rows:
    suite = SUITES["glue-small"]
    records = _once([x for x in _records(GLUE) if x["suite"] == "glue-small"])
    methods = [c.name for c in suite.contenders]
    methods = [x for x in methods if x in {record["method"] for record in records}]
    yield [
        *("task", "metric", *methods),
        *("block state, of GaLore's", "effective rank"),
    ]
    for task in suite.tasks:
        of_task = [x for x in records if x["part"] == task.name]
        rows = {row.method: row for row in rows_of(of_task, suite.measure)}
        ours, theirs = rows["adarankgrad r=8"], rows["galore r=8"]
        share = _mean(ours, "block_state_bytes") / _mean(theirs, "block_state_bytes")
        yield [
            task.name,
            ours.runs[0]["metric"],
            *(
                f"{last(rows[x], suite.measure)} ({len(rows[x].losses)})"
                for x in methods
            ),
            f"{share:.2f}",
            f"{_mean(ours, 'effective_rank'):.2f}",
        ]


def answers() -> Rows:
    yield [
        *("method", "loss of the answers", "block state, MB", "of AdamW's"),
        "peak of the step, GB",
    ]
    suite = SUITES["smollm2-gsm8k"]
    runs = {run["method"]: run for run in _records(ANSWERS)}
    for name in (c.name for c in suite.contenders if c.name in runs):
        run = runs[name]
        share = run["block_state_bytes"] / run["block_adamw_state_bytes"]
        yield [
            f"`{name}`",
            f"{run['validation_loss']:.4f}",
            f"{run['block_state_bytes'] / 1e6:.1f}",
            f"{share:.3f}",
            f"{run['step_peak_bytes'] / 1e9:.2f}",
        ]


def thresholds() -> Rows:
    yield [
        *("threshold", "weight of the past", "floor", "seed", "F1", "accuracy"),
        *("loss", "mean rank at step 10, 100, 300", "effective rank"),
        "block state, bytes",
    ]
    for run in _records(CPU):
        flags, metrics, ranks = run["flags"], run["last_metrics"], run["rank_curve"]
        ranks = dict(map(tuple, ranks))
        yield [
            f"{flags['threshold']:g}",
            # The first runs were before it was an option.
            f"{flags.get('rank_smoothing', 0.5):g}",
            f"{flags['min_rank']}",
            f"{run['seed']}",
            f"{metrics['f1']:.4f}",
            f"{metrics['accuracy']:.4f}",
            f"{run['validation_loss']:.4f}",
            ", ".join(f"{ranks[step]:.1f}" for step in (10, 100, 300)),
            f"{run['effective_rank']:.2f}",
            f"{run['block_state_bytes']:,}",
        ]


def layers() -> Rows:
    yield [
        *("task", "seed", "metric at the end", "loss", "effective rank"),
        *("block state, bytes", "of GaLore's"),
    ]
    steps = json.loads((RESULTS / "tuning-cpu/steps.json").read_text())
    (of_minilm,) = steps["cases"].values()
    galore = of_minilm["galore, full gradients"]["block_state_bytes"]
    for run in _records(("tuning-cpu/layers",)):
        size = run["block_state_bytes"]
        yield [
            *(run["task"], f"{run['seed']}"),
            f"{run['metric']} {run['last_metric']:.4f}",
            f"{run['validation_loss']:.4f}",
            f"{run['effective_rank']:.2f}",
            *(f"{size:,}", f"{size / galore:.3f}"),
        ]


def steps() -> Rows:
    yield [
        *("batch", "method", "ms a step", "against AdamW", "tokens a second"),
        *("peak, MB", "state, MB"),
    ]
    for name in ("tuning-h200/steps", "tuning-cpu/steps"):
        found = json.loads((RESULTS / f"{name}.json").read_text())
        device = found["device"].partition(": ")[2]
        for case, methods in found["cases"].items():
            timed = {k: x for k, x in methods.items() if "milliseconds" in x}
            adamw = timed["adamw"]["milliseconds"]["median"]
            for i, (method, x) in enumerate(timed.items()):
                times = x["milliseconds"]
                yield [
                    f"{case}; {device}" if i == 0 else "",
                    f"`{method}`",
                    f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})",
                    f"{times['median'] / adamw:.2f}" if method != "adamw" else "",
                    f"{x['tokens_per_second']:,.0f}",
                    f"{x['peak_bytes'] / 1e6:,.0f}",
                    f"{x['state_bytes'] / 1e6:,.1f}",
                ]


def adapters() -> Rows:
    yield ["model", "F1", "accuracy", "loss", "mean rank", "mean error", "adapter, MB"]
    rows = json.loads((RESULTS / "tuning-cpu/adapters.json").read_text())["rows"]
    for name, x in rows.items():
        cells = [""] * 3
        if "mean_rank" in x:
            size = x["adapter_bytes"] / 1e6
            cells = [f"{x['mean_rank']:.1f}", f"{x['mean_error']:.2g}", f"{size:.2f}"]
        scores = (f"{x[key]:.4f}" for key in ("f1", "accuracy", "loss"))
        yield [name, *scores, *cells]


TABLES = {
    "tuning-tasks": tasks,
    "tuning-answers": answers,
    "tuning-thresholds": thresholds,
    "tuning-layers": layers,
    "tuning-steps": steps,
    "tuning-adapters": adapters,
}


def _records(names: tuple[str, ...]) -> list[dict[str, Any]]:
    paths = [RESULTS / f"{name}.jsonl" for name in names]
    return [record for path in paths for record in read_lines(path)]


def _once(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the first run of each method, task, pair of rates and seed.

    An option that was added, at its default, made some runs new ones to the command.
    """
    names = ("part", "method", "learning_rate", "block_learning_rate", "seed")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), record)
    return list(found.values())


def _mean(row: Row, name: str) -> Any:
    return statistics.mean(run[name] for run in row.runs)
