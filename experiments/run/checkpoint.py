"""Checkpoints of a run: what it takes to continue bit for bit."""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import lowrank_optax
from experiments.distribution.processes import is_first, wait_for_all
from experiments.distribution.rules import dividing, on_mesh
from experiments.errors import UserError
from experiments.run.checksums import first_damage, write_checksums
from experiments.run.files import CHECKPOINTS, checkpoint_steps

# What Orbax calls a checkpoint while it writes it.
_UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a checkpoint holds beside arrays, as JSON.

    Attributes:
        config: From :func:`experiments.run.settings.to_json`.
        token_digest: Of the data.
        data_state: Of the training iterator, behind the last batch used.
        progress: Numbers that the next process carries on from.
    """

    config: dict[str, Any]
    token_digest: str
    data_state: Any
    progress: dict[str, Any]


def record_of(checkpoint: Path) -> RunRecord:
    """Returns the record in the directory of a checkpoint."""
    # Where Orbax puts what JsonSave is given.
    return RunRecord(**json.loads((checkpoint / "run" / "metadata").read_text()))


def read_record(directory: Path) -> RunRecord | None:
    """Returns the record of a run's newest checkpoint, all of whose files it checks.

    Args:
        directory: Of the run; nothing is written.

    Returns:
        None: There is no complete checkpoint.

    Raises:
        UserError: If one of its files is damaged.
    """
    steps = checkpoint_steps(directory)
    if not steps:
        return None
    *older, newest = steps
    path = _path(directory, newest)
    # Once for all processes: it reads everything.
    damage = first_damage(path) if is_first() else None
    if damage is not None:
        paths = (_path(directory, step) for step in reversed(older))
        good = next((x for x in paths if first_damage(x) is None), None)
        if good is None:
            mend = "no older one is whole, so start again with another --out"
        else:
            mend = f"delete what is newer than {good}, which is whole, and resume there"
        raise UserError(f"the checkpoint {path} is damaged: {damage}; {mend}")
    return record_of(path)


def restore_state(
    directory: Path, step: int, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """Returns parameters and optimizer state of a checkpoint.

    Args:
        directory: Of the run; nothing is written.
        step: Of a checkpoint whose record :func:`read_record` has read.
        params: Arrays, or shapes with shardings, like the saved ones.
        opt_state: The same for the optimizer.

    Raises:
        UserError: If it is of another structure.
    """
    path = _path(directory, step).absolute()
    like = {"params": params, "opt_state": opt_state}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path / "state").item_metadata.tree
        try:
            # A compacted state is smaller than the optimizer's first one.
            target = lowrank_optax.like_saved(target, saved)
        except ValueError as error:
            raise UserError(
                f"the checkpoint {path} does not fit this run: {error}"
            ) from error
        places = jax.tree.map(lambda x: dividing(x, x.sharding), target)
        restored = checkpointer.restore(path / "state", on_mesh(target, places))
    return restored["params"], restored["opt_state"]


class Checkpoints:
    """Saves the states of one run in the background.

    A checkpoint appears under its final name only when it is complete, with the
    checksums of its files. As a context manager it waits, at the end, for the save
    under way. One process at a time may have a directory.

    Args:
        directory: One subdirectory per step; made if missing.
        keep: Newest checkpoints to keep, >= 1.

    Attributes:
        best_step: Step of a checkpoint that is kept beside the newest ones; None: there
            is none.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory.absolute()
        self.best_step: int | None = None
        self._keep = keep
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._complain
        logging.getLogger("asyncio").addFilter(_is_no_echo)
        self._sweep()
        wait_for_all(f"sweep of {directory}")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # Asked after each save.
                preservation_policy=self,
                async_options=ocp.options.AsyncOptions(
                    # Called when all files are written, before the final name.
                    post_finalization_callback=self._write_checksums
                ),
            ),
            item_names=("state", "run"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            with self._writing():
                self._manager.close()
            sys.unraisablehook = self._old_hook
        except UserError:
            # What ended the run is told first.
            if error is None:
                raise
        finally:
            self._sweep()

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

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Says which checkpoints are kept: a preservation policy of Orbax."""
        del context
        newest = [checkpoint.step for checkpoint in checkpoints[-self._keep :]]
        return [c.step in (*newest, self.best_step) for c in checkpoints]

    def _write_checksums(self) -> None:
        if is_first():
            for unfinished in self.directory.glob(_UNFINISHED):
                write_checksums(unfinished)

    def _complain(self, unraisable) -> None:
        """Passes on what cannot be raised, but for the echoes of a failed save.

        At the first array that cannot be written, Orbax closes its event loop. The
        writes of the others end later, on threads, and each complains of that.
        """
        if str(unraisable.exc_value) != "Event loop is closed":
            self._old_hook(unraisable)

    def _sweep(self) -> None:
        """Deletes what a process that was killed, or a failed save, has left.

        Orbax's own clean-up runs in a thread that complains when the command ends
        before it does.
        """
        if is_first():
            for unfinished in self.directory.glob(_UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        # tensorstore's errors are ValueErrors.
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot write a checkpoint to {self.directory} "
                f"({_reason(error)}); make room there, then continue from the last "
                "complete one with --resume"
            ) from error


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Says whether a message of asyncio is none of a failed save, which is told.

    Of the writes that fail with the first one, asyncio complains when they are deleted:
    at once, or at the end of the process.
    """
    return "exception was never retrieved" not in record.getMessage()


def _path(directory: Path, step: int) -> Path:
    return directory / CHECKPOINTS / str(step)


def _reason(error: OSError | ValueError) -> str:
    # tensorstore names files first, then what the system says.
    found = re.search(r"([^:]+) \[os_error_code", str(error))
    if found:
        return found[1].strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]
