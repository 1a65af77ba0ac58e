"""The rows of a task: those to train on, and those to validate on by split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.hub import parse_hub_text
from experiments.errors import UserError
from experiments.tasks.rows import Rows, read_rows
from experiments.tasks.table import TaskKind

# Of a file without validation rows beside it.
_HELD_OUT_SHARE = 10
_MOST_HELD_OUT = 1000
# A data set of the hub whose examples to validate on are in a split of another name.
TESTED = {"hub:openai/gsm8k:main": "hub:openai/gsm8k:main:test"}


def read_parts(
    task: TaskKind, train: str, validation: Sequence[str] = ()
) -> tuple[Rows, dict[str, Rows]]:
    """Reads the rows to train on and those to validate on.

    Args:
        task: Names the validation splits.
        train: As in :func:`experiments.tasks.rows.read_rows`.
        validation: The same, one for each of the task's splits, or fewer: those that
            come first. None at all: the splits of the data set that ``train`` names on
            the hub; of files, every tenth row in a fixed random order, at most 1,000,
            is held out.

    Returns:
        Training rows, and validation rows by the name of their split.

    Raises:
        UserError: If rows cannot be read, more texts are given than the task has
            splits, a file is in two of the parts, or one row is all there is.
    """
    if len(validation) > len(task.splits):
        raise UserError(
            f"{len(validation)} validation texts are given, but the task has "
            f"{len(task.splits)} ({', '.join(task.splits)}); name several files of one "
            "split by a quoted glob"
        )
    hub_text = parse_hub_text(train)
    if not validation and hub_text is not None:
        head = f"hub:{hub_text.name}:{hub_text.configuration or ''}"
        validation = [f"{head}:{_on_the_hub(split)}" for split in task.splits]
        if head in TESTED:
            validation = [TESTED[head]]
    rows = read_rows(train)
    if not validation:
        return _hold_out(rows, task.splits[0])
    parts = {
        split: read_rows(spec, _on_the_hub(split))
        for split, spec in zip(task.splits, validation, strict=False)
    }
    _check_disjoint([rows, *parts.values()])
    return rows, parts


def _on_the_hub(split):
    return split if split == "validation" else f"validation_{split}"


def _hold_out(rows, split):
    if len(rows) < 2:
        raise UserError(
            f"{rows.name} has one row, but one to train on and one to validate on are "
            "needed; give more rows, or others with --validation"
        )
    # Not the last rows: many files are sorted by label.
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = min(-(-len(rows) // _HELD_OUT_SHARE), _MOST_HELD_OUT)
    name = f"{held_out:,} rows of it, held out"
    train = rows.take(sorted(order[held_out:]), rows.name)
    return train, {split: rows.take(sorted(order[:held_out]), name)}


def _check_disjoint(parts):
    known = set()
    for rows in parts:
        origins = {o.resolve() if isinstance(o, Path) else o for o in rows.origins}
        for origin in sorted(origins & known, key=str):
            raise UserError(
                f"{origin} is in two of the parts to train and to validate on; take it "
                "out of one of them"
            )
        known |= origins
