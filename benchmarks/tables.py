"""The tables of pages about memory, speed and devices, from ``benchmarks/results/``.

``python -m benchmarks.tables`` writes each table anew between its two comments. A test
compares the pages with the files.
"""

import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import (
    bytes_moved,
    collectives_tables,
    harness,
    run_tables,
    suite_tables,
)
from benchmarks.tuning import pages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = tuple(
    ROOT / f"docs/{name}.md"
    for name in (
        "memory_and_speed",
        "recipes/memory_24gb",
        "recipes/sharded",
        "finetuning",
        "many_devices",
        "concepts/refresh",
        "methods/low_rank_muon",
        "results",
    )
)
# Card -> directories of its measurements.
CARDS = {
    "H200": ("accelerator-h200", "accelerator-h200-second", "accelerator-h200-third"),
    "H100": ("accelerator-h100",),
}
NOTHING = "not measured"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

Rows = Iterator[list[str]]


def measurements(name: str) -> dict[str, Any]:
    """Returns the measurements of a file in ``benchmarks/results/``."""
    return json.loads((RESULTS / f"{name}.json").read_text())["measurements"]


def on_card(card: str, stage: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns name -> (result, run): the results on a card, each with its whole run.

    If two runs have a result, the run with more timings counts, and of equals the
    later one.
    """
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for directory in CARDS[card]:
        if not (RESULTS / f"{directory}/{stage}.json").exists():
            continue
        run = measurements(f"{directory}/{stage}")
        for name, result in run.items():
            if name not in found or _count(result) >= _count(found[name][0]):
                found[name] = result, run
    return found


def _count(result: dict[str, Any]) -> int:
    """Returns the number of timings in a result."""
    parts = [result, *result.get("alternatives", {}).values()]
    return sum("milliseconds" in part for part in parts)


def memory() -> Rows:
    yield ["one step of 60m", "state", "arguments", "temporaries", "peak"]
    for name, x in measurements("memory-60m-cpu").items():
        parts = (x[key] for key in ("state", "arguments", "temporaries", "peak"))
        yield [f"`{name}`", *(f"{part / 1e6:,.1f}" for part in parts)]


def _steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the figures of each step of 60m."""
    for file, after in (("step-60m-cpu", ""), ("step-60m-remat-cpu", ", recomputed")):
        for rank, found in measurements(file).items():
            yield rank + after, found


def step_cpu() -> Rows:
    yield [
        "one step of 60m",
        "time against AdamW",
        "against `contrib.galore`",
        "limit against AdamW",
        "compilation against AdamW",
    ]
    for name, x in _steps():
        kinds = ("against_adamw", "against_contrib.galore", "limit_against_adamw")
        compiled = x["compile_seconds"]
        yield [
            name,
            *(_pairs(x.get(kind)) for kind in kinds),
            f"{compiled['subspace'] / compiled['adamw']:.2f}",
        ]


def _pairs(found: dict[str, Any] | None) -> str:
    """Returns the ratios of pairs; nothing where there are none."""
    if found is None:
        return ""
    return _ratio(found["median"], found["least"], found["most"])


def step_memory_cpu() -> Rows:
    kinds = {
        "subspace": "usual step",
        "renewal by sketches": "that renews from sketches",
        "renewal by full gradients": "from full gradients",
        "adamw": "AdamW",
        "contrib.galore": "`contrib.galore`",
    }
    yield ["peak of one step of 60m, MB", *kinds.values()]
    for name, x in _steps():
        rows = (x["memory"].get(kind) for kind in kinds)
        yield [name, *(f"{row['peak'] / 1e6:,.1f}" if row else "" for row in rows)]


def sketches() -> Rows:
    found = measurements("sketches-cpu")
    steps = next(iter(found.values()))
    yield ["a basis made of", *(f"{name}, {step}" for name in found for step in steps)]
    for way in next(iter(steps.values())):
        numbers = (x[way] for by_step in found.values() for x in by_step.values())
        yield [f"the {way}", *(f"{number:.3f}" for number in numbers)]


def sketch_losses() -> Rows:
    yield ["validation loss", "from full gradients", "from sketches", "of the means"]
    for method, x in measurements("sketch-losses-cpu").items():
        pair = [x[kind]["losses"] for kind in ("full", "sketch")]
        told = [", ".join(f"{loss:.4f}" for loss in losses) for losses in pair]
        yield [
            f"`{method}`",
            *told,
            f"{100 * (sum(pair[1]) / sum(pair[0]) - 1):+.2f} %",
        ]


def neuron_losses() -> Rows:
    yield ["method", "validation loss", "mean", "state of the blocks against AdamW's"]
    for method, x in measurements("neuron-losses-cpu").items():
        losses = ", ".join(f"{loss:.4f}" for loss in x["losses"])
        mean = statistics.mean(x["losses"])
        yield [f"`{method}`", losses, f"{mean:.4f}", f"{x['block_state_share']:.3f}"]


def adarankgrad_long() -> Rows:
    yield ["method", "step 350", "step 700"]
    for method, x in measurements("adarankgrad-long-cpu").items():
        losses = (x["losses"].get(step) for step in ("350", "700"))
        yield [f"{method}", *("" if loss is None else f"{loss:.4f}" for loss in losses)]


def dct_losses() -> Rows:
    yield [
        "method",
        "rates: rest, blocks",
        "block state",
        "C4",
        "mean",
        "novels",
        "mean",
    ]
    for method, x in measurements("dct-losses-cpu").items():
        row = [f"`{method}`", x["rates"], f"{x['block_state_share']:.3f}"]
        for losses in x["losses"].values():
            row.append(", ".join(f"{loss:.4f}" for loss in losses))
            row.append(f"{statistics.mean(losses):.4f}" if len(losses) > 1 else "")
        yield row


def update_cpu() -> Rows:
    yield ["update of 60m", "against", "ratio of times", "ours, s", "theirs, s"]
    for file in ("update-cpu", "various-grained-update-cpu"):
        for name, x in measurements(file).items():
            ours, theirs = re.split(r",? against ", name)
            if "side" in x:
                ours = ours.replace("60m", "60m Adam in the subspace,")
            yield [ours.removeprefix("60m "), f"`{theirs}`", *_side_by_side(x)]


def renewal_cpu() -> Rows:
    yield ["update that renews every basis", "ratio of times", "ours, s", "theirs, s"]
    sizes = {"refresh-60m-cpu": "60m", "refresh-1b-one-layer-cpu": "one layer of 1b"}
    for file, size in sizes.items():
        for name, x in measurements(file).items():
            yield [f"{size}, {name}", *_side_by_side(x)]


def update_accelerator() -> Rows:
    yield ["update", "optimizer", *_heads("against AdamW")]
    units = [f"{size}, stacked, without renewal" for size in ("60m", "1b")]
    yield from _alternatives("a-update", units, "adamw")


def renewing_update_accelerator() -> Rows:
    yield [
        "update that renews every basis",
        "optimizer",
        *_heads("against `contrib.galore`"),
    ]
    units = [f"{size}, stacked, with renewal" for size in ("60m", "1b")]
    yield from _alternatives("a-update", units, "contrib.galore")


def renewal_accelerator() -> Rows:
    yield [
        "update that renews every basis",
        "basis rule",
        *_heads("against `contrib.galore`"),
    ]
    yield from _alternatives("c-refresh", ["60m", "1b-one-layer"], "contrib.galore")


def _heads(ratio: str) -> list[str]:
    heads = ("{}, ms", ratio, "trace and compile, s")
    return [head.format(card) for card in CARDS for head in heads]


def _alternatives(stage: str, units: list[str], base: str) -> Rows:
    """Yields a row for each alternative of each unit, with three cells a card."""
    found = {card: on_card(card, stage) for card in CARDS}
    for unit in units:
        of_card = {
            card: x[unit][0].get("alternatives", {}) for card, x in found.items()
        }
        names = dict.fromkeys(name for x in of_card.values() for name in x)
        for i, name in enumerate(names):
            row = [unit if i == 0 else "", f"`{name}`"]
            for alternatives in of_card.values():
                x = alternatives.get(name, {})
                row.append(_milliseconds(x))
                row.append(_against(x, alternatives.get(base, {})))
                row.append(_compiling(x))
            yield row


def step_accelerator() -> Rows:
    yield [
        "step",
        "card",
        "ms",
        "against AdamW",
        "tokens/s",
        "state, GB",
        "peak, GB",
        "planned peak, GB",
        "trace and compile, s",
    ]
    found = {card: on_card(card, "b-step") for card in CARDS}
    for name in next(iter(found.values())):
        of_card = {card: x.get(name, ({}, {})) for card, x in found.items()}
        # The page itself explains rows without a measurement.
        if not any(_count(result) for result, _ in of_card.values()):
            continue
        for card, (result, run) in of_card.items():
            base = run.get(f"{name.split()[0]} adamw, full gradients", {})
            yield [name, card, *_step(result, base)]


def inside_24gb() -> Rows:
    yield [
        "step of 7b",
        "card",
        "ms",
        "tokens/s",
        "state, GB",
        "peak, GB",
        "planned peak, GB",
        "trace and compile, s",
    ]
    found = {card: on_card(card, "d-24gb") for card in CARDS}
    for name in next(iter(found.values())):
        for card, results in found.items():
            cells = _step(results[name][0], {})
            yield [name.removeprefix("7b "), card, cells[0], *cells[2:]]


def _step(x: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "milliseconds" not in x:
        return [NOTHING, *[""] * 6]
    planned = x["planned_bytes"]
    sizes = (planned["state"], x["bytes"]["peak"], planned["peak"])
    return [
        _milliseconds(x),
        _against(x, base),
        f"{x['tokens_per_second']:,.0f}",
        *(f"{size / 1e9:.2f}" for size in sizes),
        _compiling(x),
    ]


def _milliseconds(x: dict[str, Any]) -> str:
    if "milliseconds" not in x:
        return NOTHING
    found = x["milliseconds"]
    numbers = (found["median"], found["min"], found["max"])
    digits = 3 if numbers[0] < 10 else 1
    median, least, most = (f"{number:,.{digits}f}" for number in numbers)
    is_once = found.get("batches") == 1
    return f"{median}, once" if is_once else f"{median} ({least} to {most})"


def _against(x: dict[str, Any], base: dict[str, Any]) -> str:
    if x is base or "milliseconds" not in x or "milliseconds" not in base:
        return ""
    ratio = x["milliseconds"]["median"] / base["milliseconds"]["median"]
    return f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def _compiling(x: dict[str, Any]) -> str:
    if "milliseconds" not in x:
        return ""
    return f"{x['trace_seconds'] + x['compile_seconds']:.1f}"


def _side_by_side(x: dict[str, Any]) -> list[str]:
    """Returns the ratio of the times of pairs of calls, and both medians."""
    ratio = _ratio(x["ratio_median"], x["ratio_min"], x["ratio_max"])
    times = (statistics.median(x[key]) for key in ("ours_seconds", "theirs_seconds"))
    return [ratio, *(f"{time:.3f}" for time in times)]


def _ratio(median: float, least: float, most: float) -> str:
    digits = 3 if median < 0.3 else 2
    middle, low, high = (f"{number:.{digits}f}" for number in (median, least, most))
    return middle if low == high else f"{middle} ({low} to {high})"


def _collectives(mesh: str) -> Rows:
    return collectives_tables.table(mesh, measurements("collectives"))


def _clipping() -> Rows:
    return collectives_tables.clipping(measurements("collectives"))


TABLES: dict[str, Callable[[], Rows]] = {
    "memory": memory,
    "step-cpu": step_cpu,
    "step-memory-cpu": step_memory_cpu,
    "sketches": sketches,
    "sketch-losses": sketch_losses,
    "neuron-losses": neuron_losses,
    "adarankgrad-long": adarankgrad_long,
    "dct-losses": dct_losses,
    "update-cpu": update_cpu,
    "renewal-cpu": renewal_cpu,
    "update-accelerator": update_accelerator,
    "renewing-update-accelerator": renewing_update_accelerator,
    "renewal-accelerator": renewal_accelerator,
    "step-accelerator": step_accelerator,
    "24gb": inside_24gb,
    "collectives-data": functools.partial(_collectives, "data=8"),
    "collectives-fsdp": functools.partial(_collectives, "data=2,fsdp=4"),
    "collectives-clipping": _clipping,
    **bytes_moved.TABLES,
    **pages.TABLES,
    **run_tables.TABLES,
    **suite_tables.TABLES,
}


def markdown(rows: Rows) -> str:
    """Returns a table; its first row is the heads of its columns."""
    head, *body = rows
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def filled(page: str) -> str:
    """Returns the text of a page with every table as the files have it."""

    def table(found: re.Match) -> str:
        begin, name, _, end = found.groups()
        return f"{begin}\n{markdown(TABLES[name]())}\n{end}"

    return _BLOCK.sub(table, page)


if __name__ == "__main__":
    harness.parse_no_flags(__doc__)
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text), encoding="utf-8")
