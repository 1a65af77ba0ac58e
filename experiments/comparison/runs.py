"""The runs of one suite in one directory: their order, and their outcomes."""

import concurrent.futures
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arguments import words_of
from experiments.comparison.flags import fields_of, present, settings_of
from experiments.comparison.ledger import RUNS, Ledger, best_rates, rates_of
from experiments.comparison.options import Options, chosen_names
from experiments.comparison.outcome import outcome
from experiments.comparison.processes import Processes
from experiments.comparison.report import write_report
from experiments.comparison.search import searched_rates
from experiments.comparison.suite import Contender, Suite
from experiments.comparison.trainers import TUNER
from experiments.comparison.tuning_report import write_tuning_report
from experiments.errors import UserError
from experiments.run.files import CHECKPOINTS, SUMMARY_FILE


class Comparison:
    """The runs of one suite, or of one of its tasks, in one directory.

    A context: within it the directory is its own.

    Args:
        suite: The suite, without tasks.
        directory: Directory of the results.
        rates_from: Directory of the comparison whose rates are taken, or None.
        options: Of the command.
        console: Where to print.

    Raises:
        UserError: If the data or the rates are not as they should be; on entering, if
            the directory is not.
    """

    def __init__(
        self,
        suite: Suite,
        directory: Path,
        rates_from: Path | None,
        options: Options,
        console: Console,
    ):
        self.suite, self.directory = suite, directory
        self._options, self._console = options, console
        self._data = suite.trainer.data(
            suite.flags, options.data or "", options.validation_data, options.tokenizer
        )
        self._chosen = [
            c for c in self.suite.contenders if c.name in chosen_names(options)
        ]
        self._settings = settings_of(suite)
        self._rates_from = rates_from
        self._rates = rates_from and rates_of(rates_from, suite.measure)
        self._lock = threading.Lock()
        self._started, self._done_here = time.monotonic(), 0

    def __enter__(self) -> "Comparison":
        self._ledger = Ledger(self.directory, self._definition())
        self._processes = Processes(
            self._options.jobs, self._ledger.held, self.suite.trainer.settings.program
        )
        return self

    def __exit__(self, *exception) -> None:
        self._ledger.close()

    def _definition(self) -> dict[str, Any]:
        """Returns the settings that all results must share; methods may be added."""
        return {
            "suite": self._options.suite,
            **self._data,
            "flags": dict(self.suite.flags),
            "seeds": list(self.suite.seeds),
            "search": self.suite.search,
            "rates_from": self._rates_from and str(self._rates_from),
        }

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of the suite's methods with their present settings."""
        return present(list(self._ledger.records), self._settings)

    def report(self) -> None:
        """Writes the table and the figures of the finished runs."""
        records = self.records
        if earlier := len(self._ledger.records) - len(records):
            self._console.print(
                f"{earlier} results are of settings that the suite's methods no longer "
                "have: left out of the table"
            )
        if records:
            is_tuning = self.suite.trainer is TUNER
            write = write_tuning_report if is_tuning else write_report
            write(self.directory, self._options.suite, self.suite, records)
            self._console.print(f"results in {self.directory}", soft_wrap=True)

    def run(self) -> None:
        """Runs the unfinished methods, which :meth:`check_rates` has let pass.

        Variants come after the methods whose rates they take. Among either, every
        method has its search and its first seed before any has the other seeds: a
        comparison that is stopped early has the most methods to compare.
        """
        chosen, searched = self._chosen, self._searched
        variants = [c for c in chosen if c not in searched]
        first, others = self.suite.seeds[:1], self.suite.seeds[1:]
        with concurrent.futures.ThreadPoolExecutor(
            self._options.jobs, initializer=self._processes.take_cores
        ) as pool:
            try:
                for some in (searched, variants):
                    for seeds in (first, others):
                        futures = [
                            pool.submit(self._run_contender, c, seeds) for c in some
                        ]
                        for future in concurrent.futures.as_completed(futures):
                            future.result()
            except BaseException:
                self._processes.stop()
                raise

    @property
    def _searched(self) -> list[Contender]:
        """The methods that come first; variants take the rates of another method."""
        return [c for c in self._chosen if not self._is_variant(c)]

    def check_rates(self) -> None:
        """Raises UserError, before the first run, if a method will have no rates."""
        searched = {c.name for c in self._searched if self._rates is None}
        for contender in self._chosen:
            if contender.name not in searched and contender.like not in searched:
                self._rates_like(contender)

    def _is_variant(self, contender: Contender) -> bool:
        """Returns whether a contender takes the rates of a method of the suite."""
        return any(contender.like == other.name for other in self.suite.contenders)

    def _run_contender(self, contender: Contender, seeds: Iterable[int]) -> None:
        suite, first = self.suite, self.suite.seeds[0]
        if self._rates is not None or self._is_variant(contender):
            rates = self._rates_like(contender)
        else:
            rates = searched_rates(
                contender, suite, lambda rates: self._result(contender, rates, first)
            )
        for seed in seeds:
            self._result(contender, rates, seed)

    def _rates_like(self, contender: Contender) -> tuple[float, float]:
        """Returns the best rates of the method that a contender's rates come from."""
        names = [x for x in (contender.like, contender.name) if x is not None]
        found = self._rates
        if found is None:
            suite = self.suite
            found = best_rates(self.records, len(suite.seeds), suite.measure)
        for name in names:
            if name in found:
                return found[name]
        where = self._rates_from or self.directory
        raise UserError(
            f"{where} has no rates of {names[0]!r}, which {contender.name!r} takes; "
            "run that first, or leave this one out with --only"
        )

    def _result(self, contender: Contender, rates, seed: int) -> dict[str, Any]:
        """Returns the record of a run, from the file or from running it."""
        key = {
            "method": contender.name,
            "flags": self._settings[contender.name],
            "learning_rate": rates[0],
            "block_learning_rate": rates[1],
            "seed": seed,
        }
        if self._processes.stopped:
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
        """Returns the largest number of runs that a contender may take."""
        is_searched = self._rates is None and not self._is_variant(contender)
        search = self.suite.search if is_searched else 1
        return search + len(self.suite.seeds) - 1

    def _say(self, record: Mapping[str, Any]) -> None:
        status = record["status"]
        spent = (time.monotonic() - self._started) / self._done_here
        methods = [x["method"] for x in self.records]
        most = sum(map(self._most, self._chosen))
        # A method may have more runs than needed, for instance from an earlier search.
        done = sum(min(methods.count(c.name), self._most(c)) for c in self._chosen)
        left = (most - done) * spent
        is_finished = status == "finished"
        ended = f"{record[self.suite.measure.entry]:.4f}" if is_finished else status
        self._console.print(
            f"{record['method']}, rates {record['learning_rate']:g} and "
            f"{record['block_learning_rate']:g}, seed {record['seed']}: {ended}; "
            f"{done} of at most {most} runs, at most "
            f"{left / 60:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )

    def _run(self, contender: Contender, rates, seed: int) -> dict[str, Any]:
        """Runs one process to its end; returns the outcome in its directory."""
        settings = json.dumps(self._settings[contender.name], sort_keys=True)
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
            code = self._processes.run([*flags, *(["--resume"] * is_resumed)], log)
            if self._processes.stopped:
                raise concurrent.futures.CancelledError
            is_done = (directory / SUMMARY_FILE).exists()
            said = log.read_text() if log.exists() else ""
            if not is_done and (code == 0 or "not finite" not in said):
                # The run was stopped from outside, or failed without a divergence.
                raise UserError(f"{name} ended with status {code}; {log} says why")
        return outcome(directory, self.suite)

    def _flags(self, contender, rates, seed: int, directory: Path) -> list[str]:
        fields: dict[str, Any] = {
            **fields_of(contender, self.suite),
            **{k: v for k, v in self._data.items() if v is not None},
            "learning_rate": rates[0],
            "block_scale": rates[1] / rates[0],
            "seed": seed,
            "keep_checkpoints": 1,
            "out": directory,
        }
        return words_of(fields)
