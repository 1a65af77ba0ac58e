"""A run from its parts to its end in this process."""

import contextlib
import dataclasses
import functools
import signal
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.distribution.host_memory import is_pinned
from experiments.distribution.processes import is_first
from experiments.distribution.rules import bytes_per_device
from experiments.errors import UserError
from experiments.run.checkpoint import Checkpoints
from experiments.run.failures import check_fits, told_in_a_line
from experiments.run.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    remove_leftovers,
    write_json,
)
from experiments.run.interrupts import StopRequest
from experiments.run.lock import Lock, Unlocked
from experiments.run.loop import Loop
from experiments.run.metrics import MetricsLog, NoLog
from experiments.run.parts import Parts
from experiments.run.profile import Profile
from experiments.run.progress import Progress
from experiments.run.settings import to_json
from experiments.run.terminal import TrainingProgress
from experiments.run.wandb_run import WandbRun


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where a run stands when its process ends.

    Attributes:
        params: Parameters.
        opt_state: Optimizer state.
        bytes_per_device: Of both, and of gradients like the parameters, at the end;
            of the state beside it what is in the host's memory.
        mesh: Devices along each of its axes.
        progress: How far it came.
        compile_seconds: For the steps of training and validation, in this process.
        compilations: Of the training step, in this process.
        step_peak_bytes: At the peak of the compiled steps; None: nothing was compiled,
            or the compiler does not say.
        stopped_by: The signal that stopped it; None: all steps are done.
    """

    params: Any
    opt_state: Any
    bytes_per_device: dict[str, int]
    mesh: dict[str, int]
    progress: Progress
    compile_seconds: float
    compilations: int
    step_peak_bytes: int | None
    stopped_by: signal.Signals | None


def train(parts: Parts, lock: Lock | Unlocked, console: Console) -> Trained:
    """Trains from the first step, or from the checkpoint, to the last or to a signal.

    Writes configuration, metrics and checkpoints to the run's directory. A SIGTERM or
    SIGINT ends the step, and a validation under way, and saves a checkpoint.

    Args:
        parts: From :func:`experiments.run.assemble.assemble`.
        lock: Of the run's directory.
        console: Where to show progress.

    Raises:
        UserError: If the devices have too little memory for parameters and state,
            gradients stay non-finite, the data ends, or a file cannot be written or
            restored.
    """
    config, directory = parts.config, parts.directory
    check_fits(parts)
    checkpoints = Checkpoints(directory / CHECKPOINTS, config.keep_checkpoints)
    batches = contextlib.closing(parts.work.train_iterator())
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    with StopRequest(say) as stop, checkpoints, batches as iterator:
        if checkpoints.latest_step != parts.resumed_step:
            raise UserError(
                f"another process has written to --out {directory} meanwhile; give the "
                "same command again"
            )
        if parts.resumed is None and is_first():
            remove_leftovers(directory)
            write_json(directory / CONFIG_FILE, to_json(config))
        loop = Loop(parts, lock, checkpoints, iterator)
        step = loop.progress.step
        shown = TrainingProgress(console, config.steps, step)
        profile = Profile(config.profile if is_first() else None, directory, shown.say)
        with (
            told_in_a_line(parts, loop.programs.train_steps),
            _metrics_log(config, directory, step) as metrics,
            shown,
            profile,
        ):
            stopped_by = loop.run(metrics, shown, stop, profile)
    size = bytes_per_device(loop.params)
    state = bytes_per_device(loop.opt_state)
    on_host = bytes_per_device(
        [x for x in jax.tree.leaves(loop.opt_state) if is_pinned(x)]
    )
    return Trained(
        params=loop.params,
        opt_state=loop.opt_state,
        bytes_per_device={
            "parameters": size,
            "gradients": size,
            "optimizer_state": state - on_host,
            "optimizer_state_in_host_memory": on_host,
        },
        mesh=dict(parts.mesh.shape),
        progress=loop.progress,
        compile_seconds=loop.programs.compile_seconds,
        compilations=loop.programs.compilations,
        step_peak_bytes=loop.programs.peak_bytes,
        stopped_by=stopped_by,
    )


def _metrics_log(config: Any, directory: Path, step: int) -> MetricsLog | NoLog:
    """Returns what takes the numbers of a run; the first process has them all."""
    if not is_first():
        return NoLog()
    wandb = config.wandb and WandbRun(config.wandb, directory, to_json(config))
    return MetricsLog(directory, step, wandb or None)
