"""Decides when the training loop frees columns: after a while, if it saves enough."""

import dataclasses
import math
from typing import Any

import lowrank_optax

BUCKET = 8  # columns
# Looks at the state between two decisions. A demand must be low at every look.
LOOKS = 4
# Least share of the state's bytes to free, for which a recompilation pays.
MIN_SAVING = 0.02
# The same where columns may grow again: a share of the projected matrices' bytes.
MIN_SAVING_OF_BLOCKS = 0.1


@dataclasses.dataclass
class Compaction:
    """The demand for columns so far; checkpoints store it.

    Attributes:
        looks: Looks at the state since the last decision.
        peaks: Path of a leaf -> most columns that were wanted since then.
        done: One entry for each compaction: step, bytes before, bytes after.
    """

    looks: int = 0
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    done: list[dict[str, int]] = dataclasses.field(default_factory=list)

    def look(self, opt_state: Any, has_budget: bool, most: int | None = None) -> Any:
        """Looks at a state; returns the state, or after a decision another state.

        A rank rule measures demand inside the columns that there are, so that no rank
        rises above them. Where columns may grow again, a leaf therefore keeps at least
        one column beside the demand. A demand for this one shows that more columns are
        wanted. Of the columns that a floor of the rank adds to the demand, none is
        needed to see that.

        Args:
            opt_state: Optimizer state; the call reads its ranks.
            has_budget: Whether the user gave bytes instead of a rank. The bytes are
                then spread over the leaves anew.
            most: Columns up to which a leaf may grow again, in buckets of an eighth of
                them. None: columns are freed for good, in buckets of :data:`BUCKET`.
        """
        self.looks += 1
        for path, leaf in lowrank_optax.columns(opt_state).items():
            if most is None:
                wanted = leaf.wanted(BUCKET)
            else:
                wanted = max(leaf.rank, math.ceil(leaf.demand) + 1)
            self.peaks[path] = max(wanted, self.peaks.get(path, 0))
        if self.looks < LOOKS:
            return opt_state
        peaks, self.looks, self.peaks = self.peaks, 0, {}
        if has_budget:
            return _reallocated(opt_state)
        if most is not None:
            return _refitted(opt_state, peaks, most)
        return lowrank_optax.compact(
            opt_state, BUCKET, peaks=peaks, min_saving=MIN_SAVING
        )


def _refitted(opt_state: Any, peaks: dict[str, int], most: int) -> Any:
    """Returns the state with the columns of the peaks, if that pays.

    A leaf that wants to grow always pays; the others are then cut beside it. Every
    projected side is longer than the rank, and so than ``most``.
    """
    bucket = max(1, most // 8)
    found = lowrank_optax.columns(opt_state)
    wanted = {
        path: min(most, bucket * math.ceil(peaks[path] / bucket)) for path in found
    }
    total = sum(leaf.capacity * leaf.bytes_per_column for leaf in found.values())
    freed = sum(
        (leaf.capacity - wanted[path]) * leaf.bytes_per_column
        for path, leaf in found.items()
    )
    grows = any(wanted[path] > leaf.capacity for path, leaf in found.items())
    if not grows and freed < max(1, MIN_SAVING_OF_BLOCKS * total):
        return opt_state
    return lowrank_optax.resize(opt_state, wanted)


def _reallocated(opt_state: Any) -> Any:
    """Returns the state with columns spread anew, if the new spread differs much."""
    before = lowrank_optax.capacities(opt_state)
    spread = lowrank_optax.reallocate(opt_state, bucket=BUCKET)
    after = lowrank_optax.capacities(spread)
    changes = [abs(after[path] - before[path]) for path in before]
    return spread if max(changes, default=0) >= 2 * BUCKET else opt_state
