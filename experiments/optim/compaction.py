"""Decides when the training loop frees columns: after a while, if it saves enough."""

import dataclasses
from typing import Any

import lowrank_optax

BUCKET = 8  # columns
# Looks at the state between two decisions. A demand must be low at every look.
LOOKS = 4
# Least share of the state's bytes to free, for which a recompilation pays.
MIN_SAVING = 0.02


@dataclasses.dataclass
class Compaction:
    """The demand for columns so far; checkpoints store it.

    Attributes:
        looks: Looks at the state since the last decision.
        peaks: Path of a leaf -> largest demand for columns since then.
        done: One entry for each compaction: step, bytes before, bytes after.
    """

    looks: int = 0
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    done: list[dict[str, int]] = dataclasses.field(default_factory=list)

    def look(self, opt_state: Any, has_budget: bool) -> Any:
        """Looks at a state; returns the state, or after a decision a smaller state.

        Args:
            opt_state: Optimizer state; the call reads its ranks.
            has_budget: Whether the user gave bytes instead of a rank. The bytes are
                then spread over the leaves anew.
        """
        self.looks += 1
        for path, leaf in lowrank_optax.columns(opt_state).items():
            wanted = leaf.wanted(BUCKET)
            self.peaks[path] = max(wanted, self.peaks.get(path, 0))
        if self.looks < LOOKS:
            return opt_state
        peaks, self.looks, self.peaks = self.peaks, 0, {}
        if has_budget:
            return _reallocated(opt_state)
        return lowrank_optax.compact(
            opt_state, BUCKET, peaks=peaks, min_saving=MIN_SAVING
        )


def _reallocated(opt_state: Any) -> Any:
    """Returns the state with columns spread anew, if the new spread differs much."""
    before = lowrank_optax.capacities(opt_state)
    spread = lowrank_optax.reallocate(opt_state, bucket=BUCKET)
    after = lowrank_optax.capacities(spread)
    changes = [abs(after[path] - before[path]) for path in before]
    return spread if max(changes, default=0) >= 2 * BUCKET else opt_state
