"""Whether a model fits a task."""

from pathlib import Path

from experiments.errors import UserError
from experiments.model.pretrained import find_model, kind_of
from experiments.tasks.table import TASKS

_KINDS = {"llama": "a LLaMA", "encoder": "an encoder"}


def find_model_for(task: str, model: str) -> Path:
    """Returns where a model is that can be tuned on a task.

    Args:
        task: Name of the task.
        model: What ``--model`` takes.

    Raises:
        UserError: If there is no such model, or it is of another kind than the task.
    """
    path = find_model(model)
    kind = kind_of(path)
    wanted = "llama" if TASKS[task].kind == "answer" else "encoder"
    if kind != wanted:
        raise UserError(
            f"--task {task} needs {_KINDS[wanted]}, and --model {model} is "
            f"{_KINDS[kind]}; give another --model or --task"
        )
    return path
