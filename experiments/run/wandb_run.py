"""A run in Weights & Biases: started once, and gone on with by each process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.extras import import_extra
from experiments.run.files import write_json

_RUN_FILE = "wandb.json"


def import_wandb() -> Any:
    """Returns the module, which is imported only where --wandb asks for it.

    Raises:
        UserError: If it is not installed.
    """
    needs = "--wandb needs Weights & Biases"
    return import_extra("wandb", needs, "wandb", "leave out --wandb")


class WandbRun:
    """The W&B run of a directory, whose wandb.json keeps its id.

    Without a network ``WANDB_MODE=offline`` keeps it below the directory, for
    ``wandb sync``.

    Args:
        project: Name of the W&B project.
        directory: Of the run.
        config: Its configuration, to be shown.

    Raises:
        UserError: If W&B is not installed, or refuses.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        wandb = import_wandb()
        path = directory / _RUN_FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        try:
            self._run = wandb.init(
                project=project,
                id=known.get("id"),
                resume="allow",
                name=directory.name,
                dir=directory,
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb {project}: W&B cannot start ({error}); log in with wandb "
                "login, set WANDB_MODE=offline, or leave out --wandb"
            ) from error
        if not known:
            write_json(path, {"id": self._run.id, "project": project})
        # A run that goes on from a checkpoint logs some steps again, and W&B's own
        # count of steps only grows.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, events: Mapping[str, float]) -> None:
        """Logs the events of a step."""
        self._run.log({"step": step, **events})

    def finish(self, failed: bool) -> None:
        """Ends it; W&B says whether it failed."""
        self._run.finish(exit_code=int(failed))
