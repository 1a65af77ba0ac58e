"""The loop of a run: steps, validations, log lines, checkpoints."""

import collections
import dataclasses
import functools
import signal
from typing import Any

import jax

import lowrank_optax
from experiments.distribution.host_memory import device_shardings
from experiments.distribution.placement import initial_state, place_like
from experiments.distribution.signals import SharedSignal
from experiments.errors import UserError
from experiments.optim.methods import OPTIMIZERS
from experiments.run.checkpoint import Checkpoints, restore_state
from experiments.run.clock import Clock
from experiments.run.columns import capacities_line
from experiments.run.compiled import Programs
from experiments.run.interrupts import StopRequest
from experiments.run.lock import Lock, Unlocked
from experiments.run.measures import Measures
from experiments.run.memory import optimizer_state_bytes
from experiments.run.metrics import MetricsLog, NoLog
from experiments.run.parts import Parts
from experiments.run.profile import Profile
from experiments.run.progress import Progress, note_validation, saved_progress
from experiments.run.saves import Saves
from experiments.run.terminal import TrainingProgress
from experiments.run.waits import Waits, teller
from experiments.run.work import ended

_REJECTED_IN_A_ROW = 20
# So far may Python run ahead of the device: enough to keep it busy, and few enough that
# a signal is answered soon.
_AHEAD = lowrank_optax.TrainStep.ahead


class Loop:
    """The state of a run in this process, and what is done with it."""

    def __init__(
        self,
        parts: Parts,
        lock: Lock | Unlocked,
        checkpoints: Checkpoints,
        batches: Any,
    ):
        self.parts = parts
        self.lock = lock
        self.saves = Saves(parts, lock, checkpoints)
        self.batches = batches
        self.measures = Measures(parts)
        if parts.resumed is None:
            self.progress = Progress()
            self.params = parts.initial_params()
            _, state = parts.abstract_state()
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self.opt_state = initial_state(parts.tx, self.params, shardings)
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
        if self.progress.renewals is not None:
            self.programs.go_on(self.progress.renewals)

    def run(
        self,
        log: MetricsLog | NoLog,
        shown: TrainingProgress,
        stop: StopRequest,
        profile: Profile,
    ) -> signal.Signals | None:
        """Trains to the last step or to a signal, and saves; returns the signal."""
        with Waits(teller(shown.say)) as self.waits:
            return self._run(log, shown, stop, profile)

    def _run(self, log, shown, stop, profile) -> signal.Signals | None:
        config, progress = self.parts.config, self.progress
        if progress.step == 0:
            position = self.measures.position(progress)
            log.write({"step": 0, **position, **self._validate(shown)})
            warning = self.parts.work.warning(progress.initial)
            if warning:
                shown.say(warning)
        stop.can_save = True
        shared = SharedSignal(lambda: stop.signal, self.parts.mesh, _AHEAD)
        heard = shared.heard()
        while progress.step < config.steps and heard is None:
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
            heard = shared.heard()
        self._save()
        return heard

    def _step(self) -> dict[str, jax.Array]:
        """Hands one update to the device."""
        try:
            with self.waits(f"the next batch of {self.parts.work.data_flag}"):
                batch = next(self.batches)
        except StopIteration:
            raise ended(self.parts.work, self.progress.step) from None
        if self.programs.will_compile(self.params, self.opt_state, batch):
            self.progress.seconds = self._wait()
        self.params, self.opt_state, metrics = self.programs.train_step(
            self.params, self.opt_state, batch
        )
        self.clock.start()
        self.progress.step += 1
        self.progress.tokens += self.parts.work.tokens_of(batch)
        self._restart()
        self.in_flight.append(metrics)
        if len(self.in_flight) > _AHEAD:
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
        # Arrays of the host cannot be cut.
        seen = jax.device_put(old, device_shardings(old))
        found = progress.compaction.look(seen, has_budget, config.most_columns)
        if found is seen:
            self.clock.start()
            return
        before, after = map(optimizer_state_bytes, (old, found))
        self.opt_state = place_like(found, old, self.parts.mesh)
        del old, seen, found
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
        self.progress.renewals = self.programs.due
        data_state = self.batches.get_state()
        # Until the one before is written, and this one is copied.
        with self.waits(f"a checkpoint in {self.parts.directory}"):
            self.saves.save(self.progress, self.params, self.opt_state, data_state)
