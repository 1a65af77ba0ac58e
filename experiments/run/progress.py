"""How far a run has come: the numbers that its checkpoints carry on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.optim.compaction import Compaction
from experiments.run.effective_rank import RankSums
from experiments.run.work import Criterion


@dataclasses.dataclass
class Progress:
    """Numbers of a run that its checkpoints carry on.

    Attributes:
        step: Updates done.
        tokens: Trained on in them.
        seconds: Spent on them, input and logging included; compilation, validation
            and checkpoints left out.
        initial: Numbers of the validation before the first update.
        validation: Those of the newest one.
        best: The step of the best validation since then, as ``step``, and its numbers;
            None before the first one.
        compaction: Of --compact.
        rank_sums: Of the ranks of all steps.
        changes: What was changed when the run was resumed: the ``step`` of the
            checkpoint, and by name ``settings`` before and after.
        renewals: What the next steps have to renew, see ``Programs.due``; None before
            the first checkpoint.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    initial: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None
    compaction: Compaction = dataclasses.field(default_factory=Compaction)
    rank_sums: RankSums = dataclasses.field(default_factory=RankSums)
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    renewals: list[list[int]] | None = None


def saved_progress(saved: Mapping[str, Any]) -> Progress:
    """Returns the progress that a checkpoint holds as a dict."""
    # Earlier versions wrote names. All bases then count as due, and a step asks the
    # state, which knows better.
    known = saved.get("renewals")
    parts = {
        "renewals": known if isinstance(known, list) else None,
        "compaction": Compaction(**saved["compaction"]),
        "rank_sums": RankSums(**saved["rank_sums"]),
    }
    return Progress(**{**saved, **parts})


def note_validation(
    progress: Progress, numbers: dict[str, Any], criterion: Criterion
) -> None:
    """Notes the numbers of a validation, and whether it is the best one so far."""
    progress.validation = numbers
    if progress.step == 0:
        progress.initial = numbers
        return
    best = None if progress.best is None else progress.best[criterion.name]
    if criterion.is_better(numbers[criterion.name], best):
        progress.best = {"step": progress.step, **numbers}
