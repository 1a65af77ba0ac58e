"""The ledger of a comparison: suite.json and results.jsonl in one directory."""

import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.comparison.flags import in_use, present, settings_of
from experiments.comparison.measures import Measure
from experiments.comparison.rows import rows_of
from experiments.comparison.suites import SUITES
from experiments.errors import UserError
from experiments.run.files import (
    CHECKPOINTS,
    read_lines,
    unfinished,
    write_json,
    write_whole,
)
from experiments.run.lock import LOCK_FILE, Lock

RESULTS_FILE = "results.jsonl"
SUITE_FILE = "suite.json"
RUNS = "runs"
# Settings of a comparison that may change while it stands: the limit of its searches.
_FREE = ("search",)


class Ledger:
    """The records of one comparison, open for one process and its child processes.

    Args:
        directory: Directory of the comparison; created if missing.
        definition: The settings that all results must share, by name. The limit of
            the searches alone may change.

    Raises:
        UserError: If the directory cannot be made, holds another comparison, other
            files or broken results, or is in use by another process.

    Attributes:
        directory: Directory of the comparison.
        records: One record for each finished run: the lines of results.jsonl.
    """

    def __init__(self, directory: Path, definition: Mapping[str, Any]):
        self.directory = directory
        # Before the lock, which writes a file; and as it is under the lock.
        _check(directory, definition)
        self._directory_lock = Lock(directory)
        try:
            if _check(directory, definition):
                # Nothing was done: a mistake in the data, say, that has been mended.
                shutil.rmtree(directory / RUNS, ignore_errors=True)
            self.records = _without_a_cut_line(directory / RESULTS_FILE)
        except BaseException:
            self.close()
            raise
        write_json(directory / SUITE_FILE, definition)
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Descriptor of the directory's lock, for child processes."""
        return self._directory_lock.fileno()

    def close(self) -> None:
        """Frees the directory for another process, once all runs have ended."""
        self._directory_lock.close()

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the record with these entries, or None."""
        with self._lock:
            return matching(self.records, key)

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record."""
        with self._lock:
            self.records.append(record)
            with (self.directory / RESULTS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")


def matching(
    records: Iterable[dict[str, Any]], key: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the first record with these entries, or None.

    Settings among the entries are equal if those in use are.
    """

    def equal(x: Any, y: Any) -> bool:
        are_settings = isinstance(x, Mapping) and isinstance(y, Mapping)
        return in_use(x) == in_use(y) if are_settings else x == y

    for record in records:
        if all(equal(record.get(name), value) for name, value in key.items()):
            return record
    return None


def _without_a_cut_line(path: Path) -> list[dict[str, Any]]:
    """Returns a file's records; drops a last line that was cut off.

    The next line would be written behind it.

    Raises:
        UserError: If another line is broken.
    """
    records = read_lines(path)
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) > len(records) + 1:
        raise UserError(
            f"{path}, line {len(records) + 1} is no record of a run, and others "
            "follow; mend this line, or remove it"
        )
    if lines:
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def rates_of(directory: Path, measure: Measure) -> dict[str, tuple[float, float]]:
    """Returns the best rates of each finished method, as its suite has it today.

    Args:
        directory: Of the comparison.
        measure: What is compared.

    Raises:
        UserError: If the directory holds no comparison, or one of something else.
    """
    if not (directory / SUITE_FILE).exists():
        raise UserError(f"--rates-from {directory} holds no comparison ({SUITE_FILE})")
    tasks = sorted(x.parent for x in directory.glob(f"*/{SUITE_FILE}"))
    if tasks:
        raise UserError(
            f"--rates-from {directory} has rates for each of its tasks; give "
            f"{' or '.join(map(str, tasks))}"
        )
    definition = _definition(directory)
    records = read_lines(directory / RESULTS_FILE)
    if any(measure.entry not in record for record in records):
        raise UserError(
            f"--rates-from {directory} has runs without {measure.entry}, which is what "
            "is compared here; give a comparison whose runs have it"
        )
    if suite := SUITES.get(definition["suite"]):
        # The file may be older than a flag: an unknown one is told in a line.
        suite.trainer.settings.from_json(definition["flags"])
        suite = dataclasses.replace(suite, flags=definition["flags"])
        records = present(records, settings_of(suite))
    return best_rates(records, len(definition["seeds"]), measure)


def best_rates(
    records: Iterable[Mapping[str, Any]], seeds: int, measure: Measure
) -> dict[str, tuple[float, float]]:
    """Returns the best rates of each method with at least so many seeds.

    A method of which a seed has diverged at these rates has none.
    """
    return {
        row.method: (row.learning_rate, row.block_learning_rate)
        for row in rows_of(records, measure)
        if len(row.losses) >= seeds and math.isfinite(row.mean)
    }


def _check(directory: Path, definition: Mapping[str, Any]) -> bool:
    """Returns whether the directory holds a comparison of other settings, not begun.

    Raises:
        UserError: If it holds anything else but this comparison.
    """
    if not (directory / SUITE_FILE).exists():
        # What a comparison leaves that was ended before its first file.
        own = {LOCK_FILE, unfinished(directory / SUITE_FILE).name}
        found = {x.name for x in directory.iterdir()} if directory.is_dir() else set()
        if found - own:
            raise UserError(f"--out {directory} is not empty; give another one")
        return False
    saved = _definition(directory)
    changed = [
        f"{name} was {saved.get(name)}, is {value}"
        for name, value in definition.items()
        if name not in _FREE and saved.get(name) != value
    ]
    if not changed:
        return False
    # Of itself, or of its tasks.
    done = (RESULTS_FILE, f"{RUNS}/*/{CHECKPOINTS}")
    if any(any(directory.glob(x)) for name in done for x in (name, f"*/{name}")):
        raise UserError(
            f"{directory} holds another comparison: {'; '.join(changed)}; give another "
            "--out"
        )
    return True


def _definition(directory: Path) -> dict[str, Any]:
    """Returns the settings that a comparison's file says.

    Raises:
        UserError: If it is broken.
    """
    path = directory / SUITE_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{path} is broken ({error}); mend it, or give another directory"
        ) from error
