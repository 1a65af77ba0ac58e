"""How far a run has come: the numbers that its checkpoints carry on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.optim.compaction import Compaction


@dataclasses.dataclass
class Progress:
    """Numbers of a run that its checkpoints carry on.

    Attributes:
        step: Updates done.
        seconds: Spent on them, input and logging included; compilation, validation
            and checkpoints left out.
        initial_validation_loss: Nats per token before the first update.
        validation_loss: The newest one.
        best: With --keep-best, the step of the lowest validation loss, and that loss,
            as ``step`` and ``validation_loss``; None before the first one.
        compaction: Of --compact.
        changes: What was changed when the run was resumed: the ``step`` of the
            checkpoint, and by name ``settings`` before and after.
        renewals: Which bases the next steps renew; None before the first checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    initial_validation_loss: float = float("nan")
    validation_loss: float = float("nan")
    best: dict[str, Any] | None = None
    compaction: Compaction = dataclasses.field(default_factory=Compaction)
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    renewals: dict[str, Any] | None = None


def saved_progress(saved: Mapping[str, Any]) -> Progress:
    """Returns the progress that a checkpoint holds as a dict."""
    compaction = Compaction(**saved["compaction"])
    return Progress(**{**saved, "compaction": compaction})
