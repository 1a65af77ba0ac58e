"""Ctrl-C at any moment: one line at once, status 130, nothing half-written."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS
from experiments.run import interrupts
from experiments.run.checkpoint import read_record
from experiments.run.files import checkpoint_steps
from experiments.run.interrupts import StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def left(monkeypatch):
    """Collects the lines of the ends of the process, which are not carried out."""
    lines = []
    monkeypatch.setattr(interrupts, "_leave", lines.append)
    return lines


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def signals(*numbers, can_save=True):
    """Returns what is noted, and said, of signals one after the other."""
    said = []
    with StopRequest(said.append) as stop:
        stop.can_save = can_save
        for number in numbers:
            signal.raise_signal(number)
    # At its end the listener has heard of them all.
    return stop.signal, said


def test_without_signals_nothing_is_noted_and_the_handlers_are_put_back(left):
    before = handlers()
    assert signals() == (None, [])
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1
    assert left == []


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_answered_by_a_line_and_a_second_ctrl_c_ends_all(first, left):
    assert signals(first)[0] is first
    noted, said = signals(first, signal.SIGINT)
    assert noted is first
    (line,) = said
    assert line.startswith(f"{first.name}: the run finishes its step, saves and ends")
    assert left == [
        "stopped by SIGINT without saving; --resume continues from the last complete "
        "checkpoint"
    ]


def test_a_scheduler_may_send_its_signal_twice(left):
    assert len(signals(signal.SIGTERM, signal.SIGTERM)[1]) == 1
    assert left == []


def test_before_the_first_step_ctrl_c_ends_all_and_sigterm_does_not(left):
    assert len(signals(signal.SIGTERM, can_save=False)[1]) == 1
    assert left == []
    signals(signal.SIGINT, can_save=False)
    (line,) = left
    assert line.startswith("stopped by SIGINT before the first step")


def test_a_signal_is_heard_while_the_main_thread_runs_no_python(left):
    order, is_busy = [], threading.Event()

    def send():
        is_busy.wait()
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    with StopRequest(order.append) as stop:
        stop.can_save = True
        is_busy.set()
        # A second or so, like a compilation without a line of Python.
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
        order.append("done")
    sender.join()
    assert [line[:6] for line in order] == ["SIGINT", "done"]


def start(flags, command="pretrain_llama", **environment):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{command}", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"compare", "launch"}))
def test_ctrl_c_while_importing_is_one_line(command):
    process = start([], command)
    # Python has begun, and the imports take longer.
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "stopped by SIGINT\n")
    assert process.returncode == 130


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_one_line(inputs, tmp_path):
    process = start([*inputs, "--out", tmp_path / "out"])
    wait_for(tmp_path / "out/config.json", process)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert complained.startswith("stopped by SIGINT before the first step: ")
    assert len(complained.splitlines()) == 1
    assert process.returncode == 130


@pytest.mark.slow
def test_a_second_ctrl_c_while_saving_leaves_a_whole_checkpoint(inputs, tmp_path):
    out = tmp_path / "out"
    flags = [*inputs, "--optimizer", "adamw", "--steps", 3000, "--checkpoint-every", 9]
    process = start([*flags, "--out", out], JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    wait_for(out / "checkpoints/18", process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    # The two may come together, and be one.
    if process.returncode == 130 and complained:
        assert complained.startswith("stopped by SIGINT without saving; ")
    assert "Traceback" not in said + complained
    assert process.returncode == 130
    record = read_record(out)
    assert record is not None
    assert record.progress["step"] == checkpoint_steps(out)[-1] >= 18
