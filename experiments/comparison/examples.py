"""The examples of a task in a directory, or on the hub."""

from collections.abc import Sequence
from pathlib import Path

from experiments.data.files import TABLES, find_files
from experiments.data.hub import parse_hub_text
from experiments.errors import UserError
from experiments.tasks.parts import TESTED
from experiments.tasks.table import TASKS

GLUE = "hub:nyu-mll/glue"


def find_examples(
    task: str, data: str, validation_data: str | None
) -> tuple[str, str | None]:
    """Returns what ``finetune --train`` and ``--validation`` take.

    Args:
        task: Name of the task.
        data: A directory with TASK_train.* and TASK_validation.* (or TASK_test.*),
            the name of the task left out where there is one task; GLUE on the hub; or
            what ``--train`` takes.
        validation_data: What ``--validation`` takes. None: beside the training
            examples, or what the command itself has.

    Raises:
        UserError: If there is no such file, or a directory has none of the task.

    Example:
        >>> find_examples("mrpc", "hub:nyu-mll/glue", None)
        ('hub:nyu-mll/glue:mrpc', None)
    """
    if data == GLUE:
        return f"{data}:{task}", validation_data
    if data in TESTED:
        return data, validation_data or TESTED[data]
    for spec in validation_data.split(",") if validation_data else ():
        _check_exists(spec)
    directory = Path(data)
    if not directory.is_dir():
        _check_exists(data)
        return data, validation_data
    train = _file(directory, task, ("train",))
    if validation_data is None:
        splits = TASKS[task].splits
        wanted = [
            ("validation", "test")
            if split == "validation"
            else (f"validation_{split}",)
            for split in splits
        ]
        validation_data = ",".join(_file(directory, task, parts) for parts in wanted)
    return train, validation_data


def _check_exists(spec: str) -> None:
    """Raises UserError if there are no such files; asks no hub."""
    if parse_hub_text(spec) is None:
        find_files(spec, TABLES)


def _file(directory: Path, task: str, parts: Sequence[str]) -> str:
    """Returns the one file of a task and a part, the first part that there is."""
    names = [f"{task}_{part}" for part in parts] + list(parts)
    for name in names:
        found = sorted(directory.glob(f"{name}.*"))
        if len(found) > 1:
            raise UserError(
                f"--data {directory} has {', '.join(path.name for path in found)}; "
                "leave one of them there"
            )
        if found:
            return str(found[0])
    raise UserError(
        f"--data {directory} has no {names[0]}.jsonl (nor .csv, .tsv, or one of them "
        "compressed); put it there, or give another directory"
    )
