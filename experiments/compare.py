"""Every method side by side: ``python -m experiments.compare cpu-small --out DIR``.

One process per run; what is done is skipped, what was interrupted is resumed. Results
are lines of results.jsonl; then come a table in Markdown and figures.
"""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.arguments import check_choice, flag, parse_arguments
from experiments.comparison import rows_of, write_report
from experiments.errors import UserError
from experiments.metrics import CHECKPOINTS, SUMMARY_FILE, write_json
from experiments.outcome import loss_of, outcome
from experiments.search import Point, best_point, next_point
from experiments.suites import SUITES, Contender, Suite

RESULTS_FILE = "results.jsonl"
SUITE_FILE = "suite.json"
# glibc keeps what is freed: a fifth of a small model's step on a CPU goes into giving
# pages back and taking them again.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares methods: equal data, equal search over two learning rates, seeds.

    Stop it with Ctrl-C and give the same command again: it goes on where it was.
    """

    #: Which comparison.
    suite: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="{" + ",".join(SUITES) + "}")
    ]
    #: Directory of the results. None: runs/compare-SUITE.
    out: Path | None = None
    #: Text to train on: embedded, c4 (streamed), or a path or glob.
    data: str = "embedded"
    #: Path or glob of the validation text. None: held out from --data.
    validation_data: str | None = None
    #: Tokenizer of models above tiny; see pretrain_llama.
    tokenizer: str = "bytes"
    #: Runs at a time; on CPUs each has its share of the cores, which tokens per second
    #: show.
    jobs: int = 1
    #: Methods to run, separated by commas. None: all of the suite. The table has all
    #: that are done.
    only: str | None = None
    #: Directory of another comparison: the best rates found there are taken, and
    #: nothing is searched. For other data than those that chose the rates.
    rates_from: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done; 2: a mistake of the user's, told in one line on stderr; 130: interrupted.
    """
    console = Console()
    # A scheduler's SIGTERM stops it as Ctrl-C does: runs under way save and end.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        comparison = Comparison(options, console)
        try:
            comparison.run()
        finally:
            if comparison.records:
                write_report(comparison.directory, options.suite, comparison.records)
                console.print(f"results in {comparison.directory}", soft_wrap=True)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to go on")
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _parse(argv: Sequence[str]) -> Options:
    options = parse_arguments(Options, "python -m experiments.compare", argv)
    check_choice("suite", options.suite, SUITES)
    names = [contender.name for contender in SUITES[options.suite].contenders]
    for name in _chosen(options):
        check_choice("only", name, names)
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    return options


def _chosen(options: Options) -> list[str]:
    """Returns the names of the methods to run."""
    if options.only is None:
        return [contender.name for contender in SUITES[options.suite].contenders]
    return [name.strip() for name in options.only.split(",")]


class Comparison:
    """The runs of one suite in one directory.

    Attributes:
        directory: Of the results.
        records: One for each run that is done: the lines of results.jsonl.
    """

    def __init__(self, options: Options, console: Console):
        self.suite: Suite = SUITES[options.suite]
        self.directory = options.out or Path("runs") / f"compare-{options.suite}"
        self.records: list[dict[str, Any]] = []
        self._options, self._console = options, console
        self._chosen = _chosen(options)
        self._rates = options.rates_from and _rates_of(options.rates_from)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._slots = 0
        self._started, self._done_here = time.monotonic(), 0
        _check_suite(self.directory, self._definition())
        results = self.directory / RESULTS_FILE
        if results.exists():
            self.records = [json.loads(x) for x in results.read_text().splitlines()]

    def _definition(self) -> dict[str, Any]:
        """Returns what makes results comparable; more methods may join."""
        options = self._options
        return {
            "suite": options.suite,
            "data": options.data,
            "validation_data": options.validation_data,
            "tokenizer": options.tokenizer,
            "flags": dict(self.suite.flags),
            "seeds": list(self.suite.seeds),
            "search": self.suite.search,
            "rates_from": options.rates_from and str(options.rates_from),
        }

    def run(self) -> None:
        """Runs what is not done yet."""
        chosen = [c for c in self.suite.contenders if c.name in self._chosen]
        # Those that take the rates of another come after it.
        first = [c for c in chosen if not self._is_variant(c)]
        with concurrent.futures.ThreadPoolExecutor(
            self._options.jobs, initializer=self._take_cores
        ) as pool:
            try:
                for some in (first, [c for c in chosen if c not in first]):
                    futures = [pool.submit(self._run_contender, c) for c in some]
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
            except BaseException:
                self._stop()
                raise

    def _is_variant(self, contender: Contender) -> bool:
        """Returns whether its rates are those of another method of the suite."""
        return any(contender.like == other.name for other in self.suite.contenders)

    def _take_cores(self) -> None:
        """Gives this thread's processes, which inherit them, a share of the cores."""
        jobs = self._options.jobs
        if jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return
        with self._lock:
            slot, self._slots = self._slots, self._slots + 1
        cores = sorted(os.sched_getaffinity(os.getpid()))
        mine = cores[slot::jobs] or [cores[slot % len(cores)]]
        os.sched_setaffinity(0, mine)

    def _stop(self) -> None:
        """Ends the runs under way, each with a checkpoint."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)

    def _run_contender(self, contender: Contender) -> None:
        suite = self.suite
        first, *others = suite.seeds
        if self._rates is not None:
            rates = self._rates_like(contender, self._rates)
        elif self._is_variant(contender):
            with self._lock:
                seeds = len(suite.seeds)
                rates = self._rates_like(contender, _best_rates(self.records, seeds))
        else:
            losses: dict[Point, float] = {}
            while (point := next_point(losses, suite.search)) is not None:
                record = self._result(contender, rates_at(contender, point), first)
                losses[point] = loss_of(record)
            rates = rates_at(contender, best_point(losses))
        for seed in (first, *others):
            self._result(contender, rates, seed)

    def _rates_like(
        self, contender: Contender, found: Mapping[str, tuple[float, float]]
    ) -> tuple[float, float]:
        """Returns the best rates of the method that a contender takes them from."""
        name = contender.like or contender.name
        if name not in found:
            where = self._options.rates_from or self.directory
            raise UserError(
                f"{where} has no rates of {name!r}, which {contender.name!r} takes; "
                "run that first, or leave this one out with --only"
            )
        return found[name]

    def _result(self, contender: Contender, rates, seed: int) -> dict[str, Any]:
        """Returns the record of a run, from the file or from running it."""
        key = {
            "method": contender.name,
            "flags": dict(contender.flags),
            "learning_rate": rates[0],
            "block_learning_rate": rates[1],
            "seed": seed,
        }
        with self._lock:
            if self._stopped:
                raise concurrent.futures.CancelledError
            for record in self.records:
                if all(record.get(name) == value for name, value in key.items()):
                    return record
        record = {**key, **self._run(contender, rates, seed)}
        with self._lock:
            self.records.append(record)
            self._done_here += 1
            with (self.directory / RESULTS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._say(record)
        return record

    def _most(self, contender: Contender) -> int:
        """Returns how many runs it may take."""
        is_searched = self._rates is None and not self._is_variant(contender)
        search = self.suite.search if is_searched else 1
        return search + len(self.suite.seeds) - 1

    def _say(self, record: Mapping[str, Any]) -> None:
        loss, status = record["validation_loss"], record["status"]
        spent = (time.monotonic() - self._started) / self._done_here
        done = sum(x["method"] in self._chosen for x in self.records)
        most = sum(
            self._most(c) for c in self.suite.contenders if c.name in self._chosen
        )
        left = max(0, most - done) * spent
        ended = f"{loss:.4f}" if status == "finished" else status
        self._console.print(
            f"{record['method']}, rates {record['learning_rate']:g} and "
            f"{record['block_learning_rate']:g}, seed {record['seed']}: {ended}; "
            f"{done} of at most {most} runs, at most "
            f"{left / 60:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )

    def _run(self, contender: Contender, rates, seed: int) -> dict[str, Any]:
        """Runs one process to its end; returns what its directory says."""
        name = f"{contender.name}-{rates[0]:g}-{rates[1]:g}-{seed}".replace(" ", "-")
        directory = self.directory / "runs" / name
        if not (directory / SUMMARY_FILE).exists():
            is_resumed = (directory / CHECKPOINTS).is_dir() and any(
                path.name.isdigit() for path in (directory / CHECKPOINTS).iterdir()
            )
            if not is_resumed:
                shutil.rmtree(directory, ignore_errors=True)
            directory.parent.mkdir(parents=True, exist_ok=True)
            flags = self._flags(contender, rates, seed, directory)
            log = directory.with_suffix(directory.suffix + ".log")
            code = self._process([*flags, *(["--resume"] * is_resumed)], log)
            if self._stopped:
                raise concurrent.futures.CancelledError
            is_done = (directory / SUMMARY_FILE).exists()
            if not is_done and (code == 0 or "not finite" not in log.read_text()):
                # Stopped from outside, or for a reason that is no divergence.
                raise UserError(f"{name} ended with status {code}; {log} says why")
        return outcome(directory)

    def _flags(self, contender, rates, seed: int, directory: Path) -> list[str]:
        options = self._options
        fields: dict[str, Any] = {
            **self.suite.flags,
            **contender.flags,
            "data": options.data,
            "tokenizer": options.tokenizer,
            "learning_rate": rates[0],
            "block_scale": rates[1] / rates[0],
            "seed": seed,
            "keep_checkpoints": 1,
            "out": directory,
        }
        if options.validation_data is not None:
            fields["validation_data"] = options.validation_data
        return words_of(fields)

    def _process(self, flags: list[str], log: Path) -> int:
        command = [sys.executable, "-m", "experiments.pretrain_llama", *flags]
        with log.open("w") as file:
            with self._lock:
                if self._stopped:
                    raise concurrent.futures.CancelledError
                # In a session of its own: Ctrl-C reaches it once, from here.
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    env={**_KEEP_PAGES, **os.environ},
                )
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.discard(process)


def words_of(fields: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of ``pretrain_llama`` that set these fields."""
    words = []
    for name, value in fields.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


def rates_at(contender: Contender, point: Point) -> tuple[float, float]:
    """Returns both learning rates, of the rest and of the blocks, at a point."""
    rest, blocks = point
    start = contender.learning_rate
    return start * 2.0**rest, start * contender.block_scale * 2.0**blocks


def _check_suite(directory: Path, definition: dict[str, Any]) -> None:
    """Raises if the directory holds another comparison; writes this one's name."""
    path = directory / SUITE_FILE
    if path.exists():
        saved = json.loads(path.read_text())
        changed = [
            f"{name} was {saved.get(name)}, is {value}"
            for name, value in definition.items()
            if saved.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{directory} holds another comparison: {'; '.join(changed)}; give "
                "another --out"
            )
        return
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--out {directory} is not empty; give another one")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, definition)


def _rates_of(directory: Path) -> dict[str, tuple[float, float]]:
    """Returns the best rates of each method of a finished comparison."""
    path = directory / RESULTS_FILE
    if not path.exists():
        raise UserError(f"--rates-from {directory} holds no {RESULTS_FILE}")
    return _best_rates(map(json.loads, path.read_text().splitlines()))


def _best_rates(
    records: Iterable[Mapping[str, Any]], seeds: int = 1
) -> dict[str, tuple[float, float]]:
    """Returns them for each method that has been run with as many seeds."""
    return {
        row.method: (row.learning_rate, row.block_learning_rate)
        for row in rows_of(records)
        if len(row.losses) >= seeds
    }


if __name__ == "__main__":
    sys.exit(main())
