"""Checkpoints of a run: what it takes to continue bit for bit."""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import lowrank_optax
from experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a checkpoint holds beside arrays, as JSON.

    Attributes:
        config: From :func:`experiments.run.config.to_json`.
        token_digest: Of the data.
        data_state: Of the training iterator, behind the last batch used.
        progress: Numbers that the next process carries on from.
    """

    config: dict[str, Any]
    token_digest: str
    data_state: Any
    progress: dict[str, Any]


class Checkpoints:
    """Saves in the background, and restores, the states of one run.

    A checkpoint appears under its final name only when it is complete. As a context
    manager it waits, at the end, for the save under way.

    Args:
        directory: One subdirectory per step; made if missing.
        keep: Newest checkpoints to keep, >= 1.
        resume: Whether there must be a checkpoint already; nothing is made then.

    Raises:
        UserError: If there is none.
    """

    def __init__(self, directory: Path, keep: int, *, resume: bool = False):
        self.directory = directory.absolute()
        # What a killed process was writing; Orbax's own clean-up runs in a thread that
        # complains when the command ends before it does.
        for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=not resume),
            item_names=("state", "run"),
        )
        if resume and self.latest_step is None:
            raise UserError(
                f"there is no complete checkpoint in {directory} to resume from; leave "
                "out --resume and give a new --out to start afresh"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._writing():
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None: there is none."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, opt_state: Any, run: RunRecord) -> None:
        """Copies the state, then writes it in the background.

        Args:
            step: Updates done; saved already: nothing happens.
            params: Parameters. Both trees may be donated once this returns.
            opt_state: Optimizer state.
            run: The rest.

        Raises:
            UserError: If this save, or the one before, cannot be written.
        """
        state = {"params": params, "opt_state": opt_state}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    run=ocp.args.JsonSave(dataclasses.asdict(run)),
                ),
            )

    def restore_run(self) -> RunRecord:
        """Returns the record of the newest checkpoint.

        Raises:
            UserError: If it is incomplete.
        """
        return RunRecord(**self._restore(run=ocp.args.JsonRestore())["run"])

    def restore_state(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Returns parameters and optimizer state of the newest checkpoint.

        Args:
            params: Arrays, or shapes with shardings, like the saved ones.
            opt_state: The same for the optimizer.

        Raises:
            UserError: If it is incomplete or of another structure.
        """
        like = {"params": params, "opt_state": opt_state}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        saved = self._read(self._shapes)
        try:
            # A compacted state is smaller than the optimizer's first one.
            target = lowrank_optax.like_saved(target, saved)
        except ValueError as error:
            raise UserError(
                f"the checkpoint {self.directory / str(self.latest_step)} does not fit "
                f"this run: {error}"
            ) from error
        restored = self._restore(state=ocp.args.StandardRestore(target))["state"]
        return restored["params"], restored["opt_state"]

    def _shapes(self) -> Any:
        """Returns the tree of what is saved, each leaf with its shape."""
        path = self.directory / str(self.latest_step) / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.metadata(path).item_metadata.tree

    def _restore(self, **items) -> Any:
        return self._read(
            lambda: self._manager.restore(
                self.latest_step, args=ocp.args.Composite(**items)
            )
        )

    def _read(self, read: Callable[[], Any]) -> Any:
        # At the first array that it cannot read, Orbax closes its event loop; the reads
        # of the others end on threads, some of them later, and each complains in pages.
        # They are kept quiet as long as the process lives, which is not long then.
        hook = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: None
        try:
            restored = read()
        # Orbax and tensorstore raise nearly anything on a damaged checkpoint.
        except Exception as error:
            raise UserError(
                f"the checkpoint {self.directory / str(self.latest_step)} is "
                f"incomplete or damaged ({_first_line(error)}); delete it to resume "
                "from the one before"
            ) from error
        sys.unraisablehook = hook
        return restored

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot write a checkpoint to {self.directory} "
                f"({_first_line(error)}); make room there, then continue from the last "
                "complete one with --resume"
            ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]
