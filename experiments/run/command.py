"""A training command from its arguments to its exit status."""

import dataclasses
import functools
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from experiments.arguments import flag
from experiments.distribution.agreement import check_agreement
from experiments.distribution.placement import on_host
from experiments.distribution.processes import (
    count,
    host_of,
    index,
    is_first,
    is_joined,
    join,
    of_first,
)
from experiments.distribution.watch import leave, watched
from experiments.errors import UserError, print_error
from experiments.run.failures import told_in_a_line
from experiments.run.lock import Lock, Unlocked, held_by
from experiments.run.parts import Parts
from experiments.run.settings import to_json
from experiments.run.train import Trained, train

Assemble = Callable[[Any, Callable[[str], None]], Parts[Any]]
# Writes what a finished run leaves behind, and prints its end.
Finish = Callable[[Parts[Any], Trained, Console], Any]


def run_training(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], Any],
    run: Callable[[Any, Console], int],
) -> int:
    """Runs a training command; returns its exit status.

    Args:
        argv: Arguments, without the name.
        parse: Makes them a configuration.
        run: Trains; returns the exit status.

    Returns:
        That of ``run``, see :func:`train_and_finish`; 2: a mistake of the user's, told
        in one line on stderr; 130: stopped by SIGINT.
    """
    # What Orbax logs, in pages of traceback, an error line says too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # The lengths of batches are known, and so is that each is compiled once.
    logging.getLogger("lowrank_optax").setLevel(logging.ERROR)
    try:
        status = _run_together(parse(argv), run)
    except UserError as error:
        print_error(error)
        status = 2
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BaseException:
        if is_joined():
            traceback.print_exc()
            leave(1)
        raise
    leave(status)
    return status


def _run_together(config: Any, run: Callable[[Any, Console], int]) -> int:
    """Runs with the other processes, if there are any; the first one alone speaks."""
    if config.coordinator is None:
        return run(config, _console())
    join(
        config.coordinator,
        config.num_processes,
        config.process_id,
        config.process_timeout,
    )
    again = "start all again with --resume, from the last complete checkpoint"
    alike = "start all with the same flags and packages"
    with watched(config.process_timeout, again, host_of(config.coordinator)):
        settings = {flag(k): v for k, v in to_json(config).items()}
        check_agreement(settings, "settings", alike)
        with open(os.devnull, "w") as nowhere:
            return run(config, _console(None if is_first() else nowhere))


def _console(file: IO[str] | None = None) -> Console:
    # Paths may have brackets and colons.
    return Console(file=file, markup=False, emoji=False)


def train_and_finish(
    config: Any,
    assemble: Assemble,
    finish: Finish,
    console: Console,
    whole: Path | None = None,
) -> signal.Signals | None:
    """Trains one run.

    Args:
        config: Checked.
        assemble: Builds the parts of the run.
        finish: Called at its end.
        console: Where to show progress.
        whole: Directory of several runs to continue with; None: that of the run.

    Returns:
        What stopped the run, which is saved; None: it is done. All processes get the
        same answer.

    Raises:
        UserError: If the run cannot be started or gone on with.
    """
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    parts = assemble(config, say)
    say(parts.work.description)
    check_agreement(
        {parts.work.data_flag: f"with the digest {parts.work.digest}"},
        f"the data of {parts.directory}",
        "give all the same files",
    )
    with told_in_a_line(parts), _lock_of(parts) as lock:
        trained = train(parts, lock, console)
        lock.check()
        if trained.stopped_by is not None:
            _say_how_to_resume(parts, trained, whole or parts.directory, say)
            return trained.stopped_by
        if count() > 1:
            trained = dataclasses.replace(trained, params=on_host(trained.params))
            parts = parts.at_home()
        if is_first():
            finish(parts, trained, console)
        lock.check()
    return None


def status_of(stopped: signal.Signals | None) -> int:
    """Returns the exit status of a run: 130 if SIGINT stopped it, else 0."""
    return 128 + signal.SIGINT if stopped == signal.SIGINT else 0


def _lock_of(parts: Parts) -> Lock | Unlocked:
    """Returns the lock of the run's directory: the first process has it for all.

    Raises:
        UserError: If another run has it, or another process has another directory.
    """
    lock = Lock(parts.directory) if is_first() else Unlocked()
    try:
        _check_is_shared(parts.directory, parts.config.process_timeout)
    except BaseException:
        lock.close()
        raise
    return lock


def _check_is_shared(directory: Path, seconds: float) -> None:
    """Raises UserError if the processes do not have one directory in common."""
    if count() == 1:
        return
    held = of_first(f"the lock of {directory}", held_by(directory))
    # A file system of several machines may show a new file late.
    until = time.monotonic() + seconds
    while held_by(directory) != held and time.monotonic() < until:
        time.sleep(0.5)
    if held_by(directory) != held:
        raise UserError(
            f"--out {directory} of process {index()} is not that of process 0, so that "
            "no checkpoint would be whole; give a directory that all machines share"
        )


def _say_how_to_resume(parts: Parts, trained: Trained, whole: Path, say) -> None:
    # Its config.json says the rest.
    program = parts.settings.program
    words = [*_command(program), "--out", str(whole), "--resume"]
    how = f"continue with\n  {shlex.join(words)}"
    if count() > 1:
        # What started the processes is not known here.
        how = f"start all {count()} processes again, with {shlex.join(words[-3:])}"
    assert trained.stopped_by is not None
    say(
        f"stopped by {trained.stopped_by.name} and saved at step "
        f"{trained.progress.step}; {how}"
    )


def _command(program: str) -> list[str]:
    """Returns the words that start this command, as they would be typed here."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and not sys.modules["__main__"].__package__
    return [str(python), *([str(script)] if is_script else ["-m", program])]
