"""What the works of tuning an encoder and of tuning a LLaMA share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from experiments.model.adapters import Draw
from experiments.run.work import Criterion
from experiments.tasks.table import TaskKind
from experiments.tasks.task_data import TaskData
from experiments.tuning.flags import TuningConfig
from experiments.tuning.numbers import in_words


@dataclasses.dataclass(frozen=True)
class TuningWork:
    """Examples of a task; the rest of :class:`experiments.run.work.Work` is a model's.

    Attributes:
        config: Of the run, completed.
        task: Of the run.
        data: The examples, encoded.
    """

    config: TuningConfig
    task: TaskKind
    data: TaskData

    @property
    def description(self) -> str:
        return self.data.description

    @property
    def draw(self) -> Draw:
        return "uniform"

    @property
    def digest(self) -> str:
        return self.data.digest

    @property
    def data_flag(self) -> str:
        return f"--train {self.config.train}"

    @property
    def criterion(self) -> Criterion:
        return Criterion("validation_metric", is_larger_better=True)

    @property
    def first_batches(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        # Some lengths may never come.
        return []

    @property
    def flops_per_token(self) -> None:
        return None

    def train_iterator(self) -> Any:
        return self.data.train_iterator()

    def epochs(self, step: int) -> float:
        return step / self.data.steps_per_epoch

    def told(self, numbers: Mapping[str, Any]) -> str:
        return in_words(numbers["validation_metrics"])

    def warning(self, numbers: Mapping[str, Any]) -> str | None:
        del numbers
        return None
