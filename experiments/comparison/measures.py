"""What a comparison compares: a number of a run, and which way is better."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a finished run.

    Searches minimize its cost: the number, or 1 less the number where more is better.

    Attributes:
        name: In the names of figures.
        entry: Of summary.json, and of the record of a run.
        line: Of a line of metrics.jsonl.
        label: Of axes.
        is_larger_better: Whether more is better.
    """

    name: str
    entry: str
    line: str
    label: str
    is_larger_better: bool = False

    def cost(self, record: Mapping[str, Any]) -> float:
        """Returns the cost of a recorded run, infinite if the run diverged.

        Files have None for a number that is not finite.
        """
        if record["status"] != "finished" or record[self.entry] is None:
            return math.inf
        return self.flipped(record[self.entry])

    def flipped(self, number: float) -> float:
        """Returns the cost of a number, and the number of a cost."""
        return 1 - number if self.is_larger_better else number

    def best(self, numbers: Iterable[float | None]) -> float:
        """Returns the best of some numbers; None are those that are not finite."""
        found = [x for x in numbers if x is not None]
        return max(found) if self.is_larger_better else min(found)


LOSS = Measure(
    "loss", "validation_loss", "validation_loss", "validation loss, nats per token"
)
# The primary metric of the task.
METRIC = Measure(
    "metric", "last_metric", "validation_metric", "validation metric", True
)
