"""Which bases the next step renews, known without waiting for the device."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

# Steps that may be in flight: what a step renews is read off the state so far back.
AHEAD = 2

# Key paths of the leaves whose bases a step renews; None: of all that are due.
Renewed = tuple[str, ...] | None


class Renewals:
    """What is due, step by step.

    Each state says what the step is to renew that comes :data:`AHEAD` steps after the
    next one. What has been renewed in between says so once more, and is left out here.
    A basis that is due by what the last steps measured comes so many steps later.

    Args:
        paths: Key paths of the leaves that have bases.
        together: Whether all bases that are due are renewed on one step; else one
            leaf's a step, in turns.
        known: From :meth:`saved`; None: a run starts, and all bases are due.
    """

    def __init__(
        self,
        paths: Sequence[str],
        together: bool,
        known: dict[str, Any] | None = None,
    ):
        self._paths = list(paths)
        self._together = together
        due = [self._paths] * (AHEAD + 1) if known is None else known["due"]
        self._due = collections.deque(np.isin(self._paths, x) for x in due)
        self._renewed_at = {} if known is None else dict(known["renewed_at"])

    def observe(self, due: Any) -> None:
        """Takes what the newest state has said.

        Args:
            due: bool, in the order of the paths; an array of the device, not waited
                for.
        """
        self._due.append(due)

    def next(self, step: int) -> Renewed:
        """Returns what the next step renews; waits for the step before the last AHEAD.

        Args:
            step: Updates done.
        """
        due = [
            path
            for path in self._names(self._due.popleft())
            if step - self._renewed_at.get(path, -AHEAD - 1) > AHEAD
        ]
        if not due:
            return ()
        # In turns, where more are due than there are steps.
        chosen = due if self._together else [due[step % len(due)]]
        self._renewed_at |= dict.fromkeys(chosen, step)
        return None if self._together else tuple(chosen)

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold; waits for all steps."""
        return {
            "due": [self._names(due) for due in self._due],
            "renewed_at": dict(self._renewed_at),
        }

    def _names(self, due: Any) -> list[str]:
        return [path for path, x in zip(self._paths, np.asarray(due), strict=True) if x]
