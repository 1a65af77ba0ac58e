"""The rows of a table: the results of each method at its best rates."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from experiments.comparison.outcome import loss_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at its best rates.

    Attributes:
        method: Name of the method.
        learning_rate: Learning rate of embedding, head and norms.
        block_learning_rate: Learning rate of the block matrices.
        losses: Validation loss of each seed, nats per token; infinite if it diverged.
        runs: The records of these seeds.
        tried: Number of all runs of the method.
        diverged: (rates, step) of each diverged run.
    """

    method: str
    learning_rate: float
    block_learning_rate: float
    losses: tuple[float, ...]
    runs: tuple[Mapping[str, Any], ...]
    tried: int
    diverged: tuple[tuple[float, float, int], ...]

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """Largest loss less the smallest one."""
        return max(self.losses) - min(self.losses)

    @property
    def block_share(self) -> float:
        """Bytes of the state of the block matrices, as a share of AdamW's."""
        return self._share("block_state_bytes", "block_adamw_state_bytes")

    @property
    def share(self) -> float:
        """Bytes of the whole state, as a share of AdamW's."""
        return self._share("optimizer_state_bytes", "adamw_state_bytes")

    def _share(self, ours: str, adamw: str) -> float:
        run = self.runs[0]
        # A diverged run has no summary.
        return run[ours] / run[adamw] if run.get(ours) else float("nan")


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Returns a row for each method, by rising mean loss.

    The best rates have the most seeds, and among these the least mean loss.

    Args:
        records: Lines of results.jsonl.
    """
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    return sorted(map(_row, methods.values()), key=lambda row: (row.mean, row.method))


def _row(records: Sequence[Mapping[str, Any]]) -> Row:
    by_rates: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        rates = record["learning_rate"], record["block_learning_rate"]
        by_rates.setdefault(rates, []).append(record)

    def mean(rates):
        return statistics.mean(map(loss_of, by_rates[rates]))

    best = min(by_rates, key=lambda rates: (-len(by_rates[rates]), mean(rates), rates))
    return Row(
        method=records[0]["method"],
        learning_rate=best[0],
        block_learning_rate=best[1],
        losses=tuple(map(loss_of, by_rates[best])),
        runs=tuple(by_rates[best]),
        tried=len(records),
        diverged=tuple(
            (record["learning_rate"], record["block_learning_rate"], record["step"])
            for record in sorted(records, key=lambda record: record["step"])
            if record["status"] != "finished"
        ),
    )


def front(
    rows: Iterable[T],
    costs: Callable[[T], tuple[float, float]],
) -> list[T]:
    """Returns, by rising bytes, the rows that no other row beats in bytes and loss.

    Args:
        rows: Arguments for ``costs``.
        costs: Row -> bytes and loss of the row.
    """
    found, best = [], float("inf")
    for row in sorted(rows, key=costs):
        if costs(row)[1] < best:
            best = costs(row)[1]
            found.append(row)
    return found
