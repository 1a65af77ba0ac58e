"""When the training loop frees columns: after a while, if it saves enough."""

import dataclasses
from typing import Any

import lowrank_optax

BUCKET = 8  # columns
# Looks at the state between two decisions: so long must a demand have been low.
LOOKS = 4
# Share of the state's bytes that a recompilation is worth.
MIN_SAVING = 0.02


@dataclasses.dataclass
class Compaction:
    """What has been seen of the demand for columns; carried on by checkpoints.

    Attributes:
        looks: Times that the state has been looked at since the last decision.
        peaks: Most columns that each leaf has wanted meanwhile, by its path.
        done: One entry for each compaction: step, bytes before, bytes after.
    """

    looks: int = 0
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    done: list[dict[str, int]] = dataclasses.field(default_factory=list)

    def look(self, opt_state: Any, has_budget: bool) -> Any:
        """Looks at a state; returns it, or at a decision perhaps a smaller one.

        Args:
            opt_state: Optimizer state; its ranks are read.
            has_budget: Whether bytes are given and not ranks: they are then spread over
                the leaves anew.
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
    """Returns the state with its columns spread anew, if that changes much."""
    before = lowrank_optax.capacities(opt_state)
    spread = lowrank_optax.reallocate(opt_state, bucket=BUCKET)
    after = lowrank_optax.capacities(spread)
    changes = [abs(after[path] - before[path]) for path in before]
    return spread if max(changes, default=0) >= 2 * BUCKET else opt_state
