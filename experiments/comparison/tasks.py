"""The comparisons of a suite: one, or one for each of its tasks and a joined table."""

from pathlib import Path

from rich.console import Console

from experiments.comparison.flags import present, resolved
from experiments.comparison.joined import joined_table
from experiments.comparison.ledger import RESULTS_FILE, SUITE_FILE, Ledger
from experiments.comparison.options import Options, chosen_tasks, suite_of
from experiments.comparison.runs import Comparison
from experiments.comparison.suite import Suite
from experiments.run.files import read_lines


def open_comparison(options: Options, console: Console) -> "Comparison | Comparisons":
    """Returns what the options ask for; nothing runs yet.

    Raises:
        UserError: If the data, the rates or the directory are not as they should be.
    """
    suite = suite_of(options)
    directory = options.out or Path("runs") / f"compare-{options.suite}"
    if suite.tasks:
        return Comparisons(suite, directory, options, console)
    return Comparison(suite, directory, options.rates_from, options, console)


class Comparisons:
    """The tasks of a suite, each in a directory of its own.

    Args:
        suite: The suite, with tasks.
        directory: Directory of the tasks' directories and of the joined table.
        options: Of the command.
        console: Where to print.

    Raises:
        UserError: If the data, the rates or a directory are not as they should be.
    """

    def __init__(
        self, suite: Suite, directory: Path, options: Options, console: Console
    ):
        self._suite, self.directory = suite, directory
        self._options, self._console = options, console
        chosen = [x for x in suite.tasks if x.name in chosen_tasks(options)]
        # What a task has no examples for is told before anything is made.
        for task in chosen:
            flags = {**suite.flags, **task.flags}
            suite.trainer.data(flags, options.data or "", options.validation_data, "")
        rates = options.rates_from
        definition = {
            "suite": options.suite,
            "data": options.data,
            "validation_data": options.validation_data,
            "flags": dict(suite.flags),
            "seeds": list(suite.seeds),
            "search": suite.search,
            "rates_from": rates and str(rates),
        }
        self._ledger = Ledger(directory, definition)
        self._comparisons: dict[str, Comparison] = {}
        try:
            for task in chosen:
                self._comparisons[task.name] = Comparison(
                    suite.of_task(task),
                    directory / task.name,
                    _rates_of_task(rates, task.name),
                    options,
                    console,
                )
        except BaseException:
            self._free()
            raise

    def check_rates(self) -> None:
        """Raises UserError, before the first run, if a method will have no rates."""
        for comparison in self._comparisons.values():
            comparison.check_rates()

    def run(self) -> None:
        """Runs the unfinished methods of each task, one task after the other."""
        for name, comparison in self._comparisons.items():
            self._console.print(f"task {name}", highlight=False)
            comparison.run()

    def close(self) -> None:
        """Writes the tables of the tasks and the joined one."""
        tasks = {}
        for task in self._suite.tasks:
            suite = self._suite.of_task(task)
            if task.name in self._comparisons:
                records = self._comparisons[task.name].records
            else:
                flags_of = {c.name: resolved(c, suite) for c in suite.contenders}
                path = self.directory / task.name / RESULTS_FILE
                records = present(read_lines(path), flags_of)
            if records:
                tasks[task.name] = records
        self._free()
        if tasks:
            name = self._options.suite
            text = joined_table(name, self._suite, tasks)
            (self.directory / "table.md").write_text(text)
            self._console.print(f"results in {self.directory}", soft_wrap=True)

    def _free(self) -> None:
        for comparison in self._comparisons.values():
            comparison.close()
        self._ledger.close()


def _rates_of_task(directory: Path | None, name: str) -> Path | None:
    """Returns the directory of a task's rates, or of all tasks'."""
    if directory is not None and (directory / name / SUITE_FILE).exists():
        return directory / name
    return directory
