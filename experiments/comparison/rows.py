"""The rows of a table: the results of each method at its best rates."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from experiments.comparison.measures import LOSS, Measure

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at its best rates.

    Attributes:
        method: Name of the method.
        learning_rate: Learning rate of all but the block matrices.
        block_learning_rate: Learning rate of the block matrices.
        losses: Cost of each seed, see :class:`Measure`: the validation loss in nats per
            token, or 1 less a metric; infinite if it diverged.
        runs: The records of these seeds.
        tried: Number of all runs of the method.
        searched: All rates that were tried, of the rest and of the blocks.
        diverged: (rates, step) of each diverged run.
    """

    method: str
    learning_rate: float
    block_learning_rate: float
    losses: tuple[float, ...]
    runs: tuple[Mapping[str, Any], ...]
    tried: int
    searched: frozenset[tuple[float, float]]
    diverged: tuple[tuple[float, float, int], ...]

    @property
    def rates(self) -> str:
        """The rates in words: of the rest, of the blocks."""
        return f"{self.learning_rate:g}, {self.block_learning_rate:g}"

    @property
    def divergences(self) -> str:
        """The diverged runs in words."""
        return "; ".join(
            f"{rest:g}, {blocks:g} after step {step}"
            for rest, blocks, step in self.diverged
        )

    @property
    def mean(self) -> float:
        """Mean cost over the seeds."""
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """Largest cost less the smallest one."""
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
        return run[ours] / run[adamw] if run.get(adamw) else float("nan")


def rows_of(records: Iterable[Mapping[str, Any]], measure: Measure = LOSS) -> list[Row]:
    """Returns a row for each method, by rising mean cost.

    The best rates have the most seeds, and among these the least mean cost.

    Args:
        records: Lines of results.jsonl.
        measure: What is compared.
    """
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    rows = (_row(records, measure) for records in methods.values())
    return sorted(rows, key=lambda row: (row.mean, row.method))


def _row(records: Sequence[Mapping[str, Any]], measure: Measure) -> Row:
    by_rates: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        rates = record["learning_rate"], record["block_learning_rate"]
        by_rates.setdefault(rates, []).append(record)

    def mean(rates):
        return statistics.mean(map(measure.cost, by_rates[rates]))

    best = min(by_rates, key=lambda rates: (-len(by_rates[rates]), mean(rates), rates))
    return Row(
        method=records[0]["method"],
        learning_rate=best[0],
        block_learning_rate=best[1],
        losses=tuple(map(measure.cost, by_rates[best])),
        runs=tuple(by_rates[best]),
        tried=len(records),
        searched=frozenset(by_rates),
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
