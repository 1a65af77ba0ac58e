"""``tasks`` and ``tuning-defaults``: tables of fine-tuning, from the code that runs."""

from collections.abc import Iterator, Sequence

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments.arguments import flag
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.tuning import TuningOptions, with_tuning_defaults
from experiments.tasks.table import TASKS, TaskKind

# That every method has, and that are no choice of a method.
_OF_ALL = ("rank", "block_scale", "warmup_steps")


def task_rows() -> Iterator[tuple[str, ...]]:
    """Yields name, columns, classes or range, and metrics of each task."""
    for name, task in TASKS.items():
        columns = _listed((*task.text_columns, task.label_column))
        yield f"`{name}`", columns, _labels(task), _listed(task.metrics)


def default_rows() -> Iterator[tuple[str, ...]]:
    """Yields name, scale, rank and other options of each optimizer."""
    for name in OPTIMIZERS:
        found = with_tuning_defaults(TuningOptions(optimizer=name), steps=1)
        rank, scale = found.get("rank"), found["block_scale"]
        options = ", ".join(
            f"`{flag(key)} {_said(value)}`"
            for key, value in found.items()
            if key not in _OF_ALL
        )
        yield f"`{name}`", f"{scale:g}", "" if rank is None else str(rank), options


def _labels(task: TaskKind) -> str:
    if task.kind == "answer":
        return "a text"
    if task.kind == "number":
        return "a number" + (", {:g} to {:g}".format(*task.range) if task.range else "")
    names = enumerate(task.label_names)
    return ", ".join(f"{i} {name}" for i, name in names) or "those of the rows"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Table(SphinxDirective):
    def table(self, titles: Sequence[str], rows: Iterator[Sequence[str]]):
        """Returns a table of Markdown cells."""
        lines = [titles, ["---"] * len(titles), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return self.parse_text_to_nodes(text)


class Tasks(_Table):
    """Shows every task."""

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        titles = ("`--task`", "columns, the label last", "label", "metrics")
        return self.table(titles, task_rows())


class TuningDefaults(_Table):
    """Shows what each optimizer has in fine-tuning, where flags are silent."""

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        titles = ("`--optimizer`", "`--block-scale`", "`--rank`", "other options")
        return self.table(titles, default_rows())


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directives."""
    app.add_directive("tasks", Tasks)
    app.add_directive("tuning-defaults", TuningDefaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
