"""The training loop: steps, validations, metrics, checkpoints, and how it stops."""

import collections
import contextlib
import dataclasses
import functools
import signal
from typing import Any

import jax
from rich.console import Console

from experiments.errors import UserError
from experiments.optim.methods import OPTIMIZERS
from experiments.run.checkpoint import Checkpoints, restore_state
from experiments.run.clock import Clock
from experiments.run.columns import capacities_line
from experiments.run.compiled import Programs
from experiments.run.failures import told_in_a_line
from experiments.run.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    remove_leftovers,
    write_json,
)
from experiments.run.interrupts import StopRequest
from experiments.run.lock import Lock
from experiments.run.measures import Measures
from experiments.run.memory import optimizer_state_bytes
from experiments.run.metrics import MetricsLog
from experiments.run.parts import Parts
from experiments.run.profile import Profile
from experiments.run.progress import Progress, note_validation, saved_progress
from experiments.run.renewals import AHEAD
from experiments.run.saves import Saves
from experiments.run.settings import to_json
from experiments.run.step import initial_state, replicate
from experiments.run.terminal import TrainingProgress
from experiments.run.wandb_run import WandbRun
from experiments.run.work import ended

_REJECTED_IN_A_ROW = 20


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where a run stands when its process ends.

    Attributes:
        params: Parameters.
        opt_state: Optimizer state.
        progress: How far it came.
        compile_seconds: For the steps of training and validation, in this process.
        compilations: Of the training step, in this process.
        step_peak_bytes: At the peak of the compiled steps; None: nothing was compiled,
            or the compiler does not say.
        stopped_by: The signal that stopped it; None: all steps are done.
    """

    params: Any
    opt_state: Any
    progress: Progress
    compile_seconds: float
    compilations: int
    step_peak_bytes: int | None
    stopped_by: signal.Signals | None


def train(parts: Parts, lock: Lock, console: Console) -> Trained:
    """Trains from the first step, or from the checkpoint, to the last or to a signal.

    Writes configuration, metrics and checkpoints to the run's directory. A SIGTERM or
    SIGINT ends the step, and a validation under way, and saves a checkpoint.

    Args:
        parts: From :func:`experiments.run.assemble.assemble`.
        lock: Of the run's directory.
        console: Where to show progress.

    Raises:
        UserError: If gradients stay non-finite, the data ends, or a file cannot be
            written or restored.
    """
    config, directory = parts.config, parts.directory
    checkpoints = Checkpoints(directory / CHECKPOINTS, config.keep_checkpoints)
    batches = contextlib.closing(parts.work.train_iterator())
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    with StopRequest(say) as stop, checkpoints, batches as iterator:
        if checkpoints.latest_step != parts.resumed_step:
            raise UserError(
                f"another process has written to --out {directory} meanwhile; give the "
                "same command again"
            )
        if parts.resumed is None:
            remove_leftovers(directory)
            write_json(directory / CONFIG_FILE, to_json(config))
        loop = _Loop(parts, lock, checkpoints, iterator)
        step = loop.progress.step
        shown = TrainingProgress(console, config.steps, step)
        profile = Profile(config.profile, directory, shown.say)
        wandb = config.wandb and WandbRun(config.wandb, directory, to_json(config))
        with (
            told_in_a_line(parts, loop.programs.train_steps),
            MetricsLog(directory, step, wandb or None) as metrics,
            shown,
            profile,
        ):
            loop.run(metrics, shown, stop, profile)
    return Trained(
        params=loop.params,
        opt_state=loop.opt_state,
        progress=loop.progress,
        compile_seconds=loop.programs.compile_seconds,
        compilations=loop.programs.compilations,
        step_peak_bytes=loop.programs.peak_bytes,
        stopped_by=stop.signal,
    )


class _Loop:
    """The state of a run in this process, and what is done with it."""

    def __init__(
        self, parts: Parts, lock: Lock, checkpoints: Checkpoints, batches: Any
    ):
        self.parts = parts
        self.lock = lock
        self.saves = Saves(parts, lock, checkpoints)
        self.batches = batches
        self.measures = Measures(parts)
        if parts.resumed is None:
            self.progress = Progress()
            self.params = parts.initial_params()
            self.opt_state = initial_state(parts.tx, self.params, parts.mesh)
        else:
            self.progress = saved_progress(parts.resumed.progress)
            if parts.changed:
                entry = {"step": self.progress.step, "settings": parts.changed}
                self.progress.changes.append(entry)
            self.params, self.opt_state = restore_state(
                parts.directory, self.progress.step, *parts.abstract_state()
            )
            self.batches.set_state(parts.resumed.data_state)
        self.clock = Clock(self.progress.seconds)
        self.in_flight = collections.deque()
        self.logged = dataclasses.replace(self.progress)
        self.programs = Programs(parts, self.params, self.opt_state)
        self.renewals = self.programs.renewals(self.progress.renewals)

    def run(
        self,
        log: MetricsLog,
        shown: TrainingProgress,
        stop: StopRequest,
        profile: Profile,
    ) -> None:
        """Trains to the last step or to a signal, and saves."""
        config, progress = self.parts.config, self.progress
        if progress.step == 0:
            position = self.measures.position(progress)
            log.write({"step": 0, **position, **self._validate(shown)})
            warning = self.parts.work.warning(progress.initial)
            if warning:
                shown.say(warning)
        stop.can_save = True
        while progress.step < config.steps and stop.signal is None:
            profile.before(progress.step + 1, self._wait)
            self.clock.start()
            metrics = self._step()
            profile.after(progress.step, self._wait)
            shown.advance(progress.step)
            is_last = progress.step == config.steps
            validate = is_last or progress.step % config.eval_every == 0
            if validate or progress.step == 1 or progress.step % config.log_every == 0:
                self._log(metrics, log, shown, validate)
            if config.compact and progress.step % config.compact_every == 0:
                self._compact(shown)
            if self.saves.is_due(progress, validate):
                self._save()
        self._save()

    def _step(self) -> dict[str, jax.Array]:
        """Hands one update to the device."""
        try:
            batch = next(self.batches)
        except StopIteration:
            raise ended(self.parts.work, self.progress.step) from None
        renewed = self.renewals.next(self.progress.step)
        is_compiled = self.programs.is_compiled(renewed, batch)
        if not is_compiled:
            self.progress.seconds = self._wait()
        self.params, self.opt_state, metrics = self.programs.train_step(
            renewed, self.params, self.opt_state, batch
        )
        self.clock.start()
        self.renewals.observe(metrics["due"])
        self.progress.step += 1
        self.progress.tokens += self.parts.work.tokens_of(batch)
        self._restart()
        self.in_flight.append(metrics)
        # So far may Python run ahead of the device: enough to keep it busy, and few
        # enough that a signal is answered soon.
        if len(self.in_flight) > AHEAD:
            self._check()
        return metrics

    def _restart(self) -> None:
        """Merges the adapters of ReLoRA, and starts them anew, where that is due."""
        config = self.parts.config
        is_due = self.progress.step % (config.update_proj_gap or 1) == 0
        if OPTIMIZERS[config.optimizer].adapters != "relora" or not is_due:
            return
        key = jax.random.fold_in(jax.random.key(config.seed), self.progress.step)
        self.params, self.opt_state = self.programs.restart(
            self.params, self.opt_state, key
        )

    def _compact(self, shown: TrainingProgress) -> None:
        """Looks at the state, and may cut its arrays and compile the step anew."""
        progress, old = self.progress, self.opt_state
        config = self.parts.config
        has_budget = config.block_state_bytes is not None
        progress.seconds = self._wait()
        self.opt_state = progress.compaction.look(old, has_budget, config.most_columns)
        if self.opt_state is old:
            self.clock.start()
            return
        before, after = map(optimizer_state_bytes, (old, self.opt_state))
        self.opt_state = replicate(self.opt_state, self.parts.mesh)
        del old
        self.programs.compile_train_steps(self.params, self.opt_state)
        entry = {"step": progress.step, "bytes_before": before, "bytes_after": after}
        progress.compaction.done.append(entry)
        shown.say(
            f"optimizer state {before:,} -> {after:,} bytes at step {progress.step}: "
            f"{capacities_line(self.opt_state)}; "
            f"compilation {self.programs.compilations}"
        )
        self.clock.start()

    def _check(self) -> None:
        """Waits for the oldest step, and gives up where nothing is learned for long."""
        metrics = self.in_flight.popleft()
        self.progress.rank_sums.add(metrics["ranks"])
        if int(metrics["rejected_in_a_row"]) >= _REJECTED_IN_A_ROW:
            raise UserError(
                f"the gradients of {_REJECTED_IN_A_ROW} steps in a row, up to about "
                f"step {self.progress.step}, were not finite; lower --learning-rate or "
                "--block-scale, or train with --compute-dtype float32"
            )

    def _check_all(self) -> None:
        while self.in_flight:
            self._check()

    def _log(self, metrics, log, shown, validate: bool) -> None:
        """Writes a line on the step that was handed out last, and may validate."""
        self.lock.check()
        progress, logged = self.progress, self.logged
        progress.seconds = self._wait()
        self.clock.start()
        self._check_all()
        self.logged = dataclasses.replace(progress)
        record = {
            "step": progress.step,
            **self.measures.position(progress),
            **self.measures.speed(
                progress.tokens - logged.tokens,
                progress.step - logged.step,
                progress.seconds - logged.seconds,
            ),
            **self.measures.step(progress.step, metrics, self.opt_state),
        }
        shown.show(record)
        if validate:
            record |= self._validate(shown)
        log.write(record)

    def _validate(self, shown: TrainingProgress) -> dict[str, Any]:
        """Returns the numbers of a validation."""
        self._wait()
        work, progress = self.parts.work, self.progress
        evaluate = functools.partial(self.programs.evaluate, self.params)
        found = work.validate(self.params, evaluate)
        note_validation(progress, found, work.criterion)
        shown.validated(progress.step, found["validation_loss"], work.told(found))
        return found

    def _wait(self) -> float:
        """Waits for the device and stops the clock; returns its seconds."""
        return self.clock.stop(self.params)

    def _save(self) -> None:
        self.progress.seconds = self._wait()
        self._check_all()
        self.progress.renewals = self.renewals.saved()
        data_state = self.batches.get_state()
        self.saves.save(self.progress, self.params, self.opt_state, data_state)
