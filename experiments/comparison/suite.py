"""What a comparison is: its methods, its tasks and its search."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.comparison.measures import LOSS, Measure
from experiments.comparison.trainers import PRETRAINER, Trainer


@dataclasses.dataclass(frozen=True)
class Contender:
    """One method of a comparison.

    Attributes:
        name: Name in tables and in directory names.
        flags: Flags of the trainer's command, by field.
        learning_rate: Learning rate, at the start of the search, of all but the block
            matrices: embedding, head, norms.
        block_scale: Learning rate of the block matrices at the start of the search, as
            a multiple of ``learning_rate``.
        like: Another method, of the suite or of ``--rates-from``. Its best rates are
            taken, and nothing is searched. None, or if neither has it: the contender
            has its own search.
        trains_blocks: Whether the rate of the block matrices has an effect. False: the
            other rate alone is searched.
    """

    name: str
    flags: Mapping[str, Any]
    block_scale: float
    learning_rate: float = 8e-3
    like: str | None = None
    trains_blocks: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the tasks of a suite: a comparison of its own.

    Attributes:
        name: Name in the joined table, and of its directory.
        flags: Flags of its runs, by field, beside those of the suite.
        learning_rate: Where its searches start, in the place of the contenders' own.
    """

    name: str
    flags: Mapping[str, Any]
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """A comparison.

    Attributes:
        description: One sentence.
        flags: Flags of every run, by field.
        contenders: The methods.
        seeds: Seeds of the weights and of the order of the data. Runs with the first
            seed choose the rates; runs with all seeds follow at the best rates.
        search: Most runs of a method for its two rates; 1: no search.
        data: Text or examples to train on, if the command line names none. None: it
            has to.
        needs_tokenizer: Whether the model needs a tokenizer other than bytes.
        trainer: The command that trains.
        measure: What is compared.
        tasks: Each is a comparison of its own. Empty: the suite is one comparison.
        needs_model: Whether the command line has to name the model.
    """

    description: str
    flags: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    search: int = 6
    data: str | None = "embedded"
    needs_tokenizer: bool = False
    trainer: Trainer = PRETRAINER
    measure: Measure = LOSS
    tasks: tuple[Task, ...] = ()
    needs_model: bool = False

    def changed(self, *, steps: int | None = None, model: str | None = None) -> "Suite":
        """Returns the suite with runs of another length, or of another model."""
        flags = dict(self.flags)
        if steps is not None:
            flags.pop("epochs", None)
            flags["steps"] = steps
        if model is not None:
            flags["model"] = model
        return dataclasses.replace(self, flags=flags)

    def of_task(self, task: Task) -> "Suite":
        """Returns the comparison of one task."""
        contenders = self.contenders
        if task.learning_rate is not None:
            contenders = tuple(
                dataclasses.replace(c, learning_rate=task.learning_rate)
                for c in contenders
            )
        flags = {**self.flags, **task.flags}
        return dataclasses.replace(self, flags=flags, contenders=contenders, tasks=())
