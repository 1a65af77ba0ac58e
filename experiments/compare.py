"""Every method side by side: ``python -m experiments.compare cpu-small --out DIR``.

One process per run; what is done is skipped, what was interrupted is resumed. Results
are lines of results.jsonl (``ledger``); then come a table in Markdown and figures.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.arguments import check_choice, flag, parse_arguments
from experiments.comparison.ledger import RUNS, Ledger, best_rates, rates_of
from experiments.comparison.outcome import loss_of, outcome
from experiments.comparison.report import write_report
from experiments.comparison.search import Point, best_point, next_point
from experiments.comparison.suites import SUITES, Contender, Suite
from experiments.errors import UserError
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS
from experiments.run.config import complete, parse
from experiments.run.metrics import CHECKPOINTS, SUMMARY_FILE

# Ways to be told to stop; a lost terminal is one.
_STOPS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]
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
    #: Text to train on: embedded, c4 (streamed), or a path or glob. None: what the
    #: suite is about, embedded for the tiny model, c4 for larger ones.
    data: str | None = None
    #: Path or glob of the validation text. None: held out from --data.
    validation_data: str | None = None
    #: bytes, or the path of a SentencePiece .model or of a tokenizer.json, which models
    #: above tiny need.
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
    # They stop it as Ctrl-C does: runs under way save and end.
    previous = {
        number: signal.signal(number, signal.default_int_handler) for number in _STOPS
    }
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        comparison = Comparison(options, console)
        try:
            comparison.run()
        finally:
            comparison.close()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to go on")
        return 128 + signal.SIGINT
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _parse(argv: Sequence[str]) -> Options:
    options = parse_arguments(Options, "python -m experiments.compare", argv)
    check_choice("suite", options.suite, SUITES)
    names = [contender.name for contender in SUITES[options.suite].contenders]
    for name in _chosen(options):
        check_choice("--only", name, names)
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    suite = SUITES[options.suite]
    if suite.needs_tokenizer and options.tokenizer == "bytes":
        raise UserError(
            f"{options.suite} needs --tokenizer, the path of a SentencePiece .model or "
            "of a tokenizer.json; about 32,000 tokens are what its model was made for"
        )
    return dataclasses.replace(options, data=options.data or suite.data)


def _chosen(options: Options) -> list[str]:
    """Returns the names of the methods to run."""
    if options.only is None:
        return [contender.name for contender in SUITES[options.suite].contenders]
    return [name.strip() for name in options.only.split(",")]


class Comparison:
    """The runs of one suite in one directory.

    Attributes:
        directory: Of the results.
    """

    def __init__(self, options: Options, console: Console):
        self.suite: Suite = SUITES[options.suite]
        self.directory = options.out or Path("runs") / f"compare-{options.suite}"
        self._options, self._console = options, console
        self._chosen = [c for c in self.suite.contenders if c.name in _chosen(options)]
        self._flags_of = {
            c.name: resolved(c, self.suite) for c in self.suite.contenders
        }
        self._rates = options.rates_from and rates_of(options.rates_from)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._slots = 0
        self._started, self._done_here = time.monotonic(), 0
        self._ledger = Ledger(self.directory, self._definition())

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

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the suite's methods as they are defined now."""
        return [
            record
            for record in list(self._ledger.records)
            if self._flags_of.get(record["method"]) == record["flags"]
        ]

    def close(self) -> None:
        """Writes the table and the figures of what is done."""
        records = self.records
        if earlier := len(self._ledger.records) - len(records):
            self._console.print(
                f"{earlier} results are of settings that the suite's methods no longer "
                "have: left out of the table"
            )
        if records:
            write_report(self.directory, self._options.suite, self.suite, records)
            self._console.print(f"results in {self.directory}", soft_wrap=True)
        self._ledger.close()

    def run(self) -> None:
        """Runs what is not done yet."""
        chosen = self._chosen
        # Those that take the rates of another come after it.
        first = [c for c in chosen if not self._is_variant(c)]
        self._check_rates({c.name for c in first if self._rates is None})
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

    def _check_rates(self, searched: set[str]) -> None:
        """Raises, before anything is run, if rates are wanted that nobody finds.

        Args:
            searched: Methods whose rates this run searches.
        """
        for contender in self._chosen:
            if contender.name not in searched and contender.like not in searched:
                self._rates_like(contender)

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
        if self._rates is not None or self._is_variant(contender):
            rates = self._rates_like(contender)
        else:
            losses: dict[Point, float] = {}
            while (point := next_point(losses, suite.search)) is not None:
                record = self._result(contender, rates_at(contender, point), first)
                losses[point] = loss_of(record)
            rates = rates_at(contender, best_point(losses))
        for seed in (first, *others):
            self._result(contender, rates, seed)

    def _rates_like(self, contender: Contender) -> tuple[float, float]:
        """Returns the best rates of the method that a contender takes them from."""
        name = contender.like or contender.name
        found = self._rates
        if found is None:
            found = best_rates(self.records, len(self.suite.seeds))
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
            "flags": self._flags_of[contender.name],
            "learning_rate": rates[0],
            "block_learning_rate": rates[1],
            "seed": seed,
        }
        if self._stopped:
            raise concurrent.futures.CancelledError
        record = self._ledger.find(key)
        if record is None:
            record = {**key, **self._run(contender, rates, seed)}
            self._ledger.add(record)
            with self._lock:
                self._done_here += 1
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
        methods = [x["method"] for x in self.records]
        most = sum(map(self._most, self._chosen))
        # A method may have more runs than it can need: of an earlier search, say.
        done = sum(min(methods.count(c.name), self._most(c)) for c in self._chosen)
        left = (most - done) * spent
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
        settings = json.dumps(self._flags_of[contender.name], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
        name = f"{contender.name}-{rates[0]:g}-{rates[1]:g}-{seed}-{digest}"
        name = name.replace(" ", "-")
        directory = self.directory / RUNS / name
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
                    # Should this process die, the run keeps the directory.
                    pass_fds=[self._ledger.held],
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


def resolved(contender: Contender, suite: Suite) -> dict[str, Any]:
    """Returns a contender's flags and what its method has where they are silent.

    With them a result is recorded: where a default has changed since, it is another's.
    """
    config = parse(words_of({**suite.flags, **contender.flags}))
    config = complete(config, hidden_size=MODELS[config.model]["hidden_size"])
    own = OPTIMIZERS[config.optimizer].own
    return {**contender.flags, **{name: getattr(config, name) for name in sorted(own)}}


def rates_at(contender: Contender, point: Point) -> tuple[float, float]:
    """Returns both learning rates, of the rest and of the blocks, at a point."""
    rest, blocks = point
    start = contender.learning_rate
    return start * 2.0**rest, start * contender.block_scale * 2.0**blocks


if __name__ == "__main__":
    sys.exit(main())
