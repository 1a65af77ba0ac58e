"""Runs the measurements of the stages in the given time; see the package."""

import argparse
import fnmatch
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accelerator import records, tables, workers
from benchmarks.accelerator.units import Unit, catalogue


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator")
    parser.add_argument("--out", type=Path, required=True, help="directory for JSON")
    parser.add_argument("--stages", nargs="+", choices=records.FILES, default=None)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="names of units"
    )
    parser.add_argument("--minutes", type=float, default=8, help="to end within")
    parser.add_argument("--smoke", action="store_true", help="toys on a CPU")
    parser.add_argument("--commit", default="", help="to record; else git is asked")
    parser.add_argument("--worker", choices=records.FILES, help=argparse.SUPPRESS)
    parser.add_argument("--units", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    units = catalogue(options.smoke)
    if options.worker:
        wanted = [x for x in units if x.stage == options.worker]
        chosen = [x for x in wanted if x.name in options.units]
        workers.measure(chosen, options.out, options.seconds, options.smoke)
        return
    stages = options.stages or list(records.FILES)
    for stage in stages:
        records.start(options.out, stage, options.commit)
    chosen = [
        unit
        for unit in units
        if unit.stage in stages
        and any(fnmatch.fnmatch(unit.name, pattern) for pattern in options.only)
    ]
    with tempfile.TemporaryDirectory() as cache:
        seconds = 60 * options.minutes
        _run(chosen, options.out, seconds, Path(cache), options.smoke)


def _run(
    units: Sequence[Unit], out: Path, seconds: float, cache: Path, is_smoke: bool
) -> None:
    """Measures the units, one process after the other, and prints the results."""
    started = time.monotonic()
    waiting = [x.stage for x in units]
    groups = itertools.groupby(units, key=lambda x: (x.stage, x.process))
    for (stage, process), group in groups:
        members = list(group)
        left = seconds - (time.monotonic() - started) - workers.GRACE
        begun = time.monotonic()
        if left < members[0].least:
            for unit in members:
                reason = {"skipped": f"{max(left, 0):.0f} s were left of all"}
                records.add(out, stage, unit.name, reason)
        else:
            most = sum(unit.most for unit in members)
            workers.run(members, out, min(most, left), cache, is_smoke)
        spent = time.monotonic() - begun
        print(f"stage {stage}: {process}, {spent:.0f} s", flush=True)
        for _ in members:
            waiting.remove(stage)
        if stage not in waiting:
            print(f"\n{tables.text(stage, records.load(out, stage))}\n", flush=True)


if __name__ == "__main__":
    main()
