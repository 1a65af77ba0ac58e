"""The comparisons of a suite: one, or one for each of its tasks and a joined table."""

import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.comparison.flags import present, settings_of
from experiments.comparison.joined import joined_table
from experiments.comparison.ledger import RESULTS_FILE, SUITE_FILE, Ledger
from experiments.comparison.options import Options, chosen_tasks, suite_of
from experiments.comparison.runs import Comparison
from experiments.comparison.suite import Suite, Task
from experiments.run.files import read_lines


def comparison_of(options: Options, console: Console) -> "Comparison | Comparisons":
    """Returns what the options ask for; nothing runs yet, and nothing is written.

    Raises:
        UserError: If the data or the rates are not as they should be.
    """
    suite = suite_of(options)
    directory = options.out or Path("runs") / f"compare-{options.suite}"
    if suite.tasks:
        return Comparisons(suite, directory, options, console)
    return Comparison(suite, directory, options.rates_from, options, console)


class Comparisons:
    """The tasks of a suite, each in a directory of its own.

    A context: within it the directories are its own.

    Args:
        suite: The suite, with tasks.
        directory: Directory of the tasks' directories and of the joined table.
        options: Of the command.
        console: Where to print.

    Raises:
        UserError: If the data or the rates are not as they should be; on entering, if
            a directory is not.
    """

    def __init__(
        self, suite: Suite, directory: Path, options: Options, console: Console
    ):
        self._suite, self.directory = suite, directory
        self._options, self._console = options, console
        self._comparisons = {
            task.name: Comparison(
                suite.of_task(task),
                directory / task.name,
                _rates_of_task(options.rates_from, task.name),
                options,
                console,
            )
            for task in suite.tasks
            if task.name in chosen_tasks(options)
        }

    def __enter__(self) -> "Comparisons":
        with contextlib.ExitStack() as stack:
            ledger = Ledger(self.directory, self._definition())
            stack.callback(ledger.close)
            for comparison in self._comparisons.values():
                stack.enter_context(comparison)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._held.close()

    def _definition(self) -> dict[str, Any]:
        """Returns the settings that all tasks must share; tasks may be added."""
        rates = self._options.rates_from
        return {
            "suite": self._options.suite,
            "data": self._options.data,
            "flags": dict(self._suite.flags),
            "seeds": list(self._suite.seeds),
            "search": self._suite.search,
            "rates_from": rates and str(rates),
        }

    def check_rates(self) -> None:
        """Raises UserError, before the first run, if a method will have no rates."""
        for comparison in self._comparisons.values():
            comparison.check_rates()

    def run(self) -> None:
        """Runs the unfinished methods of each task, one task after the other."""
        for name, comparison in self._comparisons.items():
            self._console.print(f"task {name}", highlight=False)
            comparison.run()

    def report(self) -> None:
        """Writes the tables of the chosen tasks, and the joined one of all tasks."""
        for comparison in self._comparisons.values():
            comparison.report()
        records = {task.name: self._records(task) for task in self._suite.tasks}
        found = {name: some for name, some in records.items() if some}
        if found:
            text = joined_table(self._options.suite, self._suite, found)
            (self.directory / "table.md").write_text(text)
            self._console.print(f"results in {self.directory}", soft_wrap=True)

    def _records(self, task: Task) -> list[dict[str, Any]]:
        """Returns the records of a task, chosen or not."""
        if task.name in self._comparisons:
            return self._comparisons[task.name].records
        suite = self._suite.of_task(task)
        records = read_lines(self.directory / task.name / RESULTS_FILE)
        return present(records, settings_of(suite))


def _rates_of_task(directory: Path | None, name: str) -> Path | None:
    """Returns the directory of a task's rates; one comparison is that of all tasks."""
    if directory is not None and any(directory.glob(f"*/{SUITE_FILE}")):
        return directory / name
    return directory
