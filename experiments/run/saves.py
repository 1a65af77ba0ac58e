"""When a run saves a checkpoint: by steps, by the clock, at its best validation."""

import dataclasses
import math
import time
from typing import Any

from experiments.distribution.processes import is_first
from experiments.run.checkpoint import Checkpoints, RunRecord
from experiments.run.files import CONFIG_FILE, write_json
from experiments.run.lock import Lock, Unlocked
from experiments.run.parts import Parts
from experiments.run.progress import Progress
from experiments.run.settings import to_json


class Saves:
    """The checkpoints that a run makes in this process.

    Args:
        parts: Of the run.
        lock: Of its directory.
        checkpoints: Where they go.
    """

    def __init__(self, parts: Parts, lock: Lock | Unlocked, checkpoints: Checkpoints):
        self._parts, self._lock, self._checkpoints = parts, lock, checkpoints
        self._saved_at = time.monotonic()

    def is_due(self, progress: Progress, validated: bool) -> bool:
        """Returns whether a checkpoint follows this step.

        Args:
            progress: How far the run is.
            validated: Whether there was a validation at this step.
        """
        config = self._parts.config
        minutes = (time.monotonic() - self._saved_at) / 60
        is_best = (
            validated
            and config.keep_best
            and progress.best is not None
            and progress.best["step"] == progress.step
        )
        return (
            is_best
            or progress.step == config.steps
            or progress.step % config.checkpoint_every == 0
            or minutes >= (config.checkpoint_minutes or math.inf)
        )

    def save(
        self, progress: Progress, params: Any, opt_state: Any, data_state: Any
    ) -> None:
        """Saves, unless this step is saved already.

        Args:
            progress: How far the run is.
            params: Parameters.
            opt_state: Optimizer state.
            data_state: Of the training iterator.

        Raises:
            UserError: If the directory is gone, or nothing can be written to it.
        """
        config = self._parts.config
        self._lock.check()
        if config.keep_best and progress.best is not None:
            self._checkpoints.best_step = progress.best["step"]
        self._checkpoints.save(
            progress.step,
            params,
            opt_state,
            RunRecord(
                config=to_json(config),
                token_digest=self._parts.work.digest,
                data_state=data_state,
                progress=dataclasses.asdict(progress),
            ),
        )
        # Not before: it says what the newest checkpoint was made with.
        past = {"changes": progress.changes} if progress.changes else {}
        if is_first():
            path = self._parts.directory / CONFIG_FILE
            write_json(path, {**to_json(config), **past})
        self._saved_at = time.monotonic()
