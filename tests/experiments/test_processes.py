"""Runs of several processes on this machine: what they compute, and how they end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run.files import checkpoint_steps
from tests.experiments.small_runs import read_lines, write_inputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
# Of a sign of life; a death is noticed at once.
TIMEOUT = 20


def started(words, processes, devices, own, folders):
    """Returns the processes of one run, each with so many simulated devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_CPU_ENABLE_ASYNC_DISPATCH", None)
    command = [sys.executable, "-m", "experiments.pretrain_llama", *map(str, words)]
    found = []
    for i in range(processes):
        joined = []
        if processes > 1:
            joined = [
                *("--coordinator", f"127.0.0.1:{port}"),
                *("--num-processes", str(processes), "--process-id", str(i)),
                *("--process-timeout", str(TIMEOUT)),
            ]
        found.append(
            subprocess.Popen(
                [*command, *map(str, own[i]), *joined],
                env=environment,
                cwd=folders[i],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


@contextlib.contextmanager
def running(words, processes=2, devices=2, own=(), folders=()):
    """Gives the processes of a run, and leaves none behind."""
    own, folders = own or [()] * processes, folders or [ROOT] * processes
    found = started(words, processes, devices, own, folders)
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            for pipe in (process.stdout, process.stderr):
                pipe.close()
            process.wait()


def ends(processes):
    """Returns exit status and stderr of each process."""
    ended = [process.communicate(timeout=SECONDS) for process in processes]
    return [
        (process.returncode, stderr)
        for process, (_, stderr) in zip(processes, ended, strict=True)
    ]


def finish(*words, processes=2, devices=2):
    with running(words, processes, devices) as found:
        for status, stderr in ends(found):
            assert status == 0, stderr[-2000:]


def wait_until(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    # Coded moments, micro-batches, parameters cut over both processes.
    return [
        *write_inputs(tmp_path_factory.mktemp("inputs")),
        *("--optimizer", "sumo", "--rank", 4, "--moment-bits", 8, "--accumulate", 2),
        *("--mesh", "fsdp=4", "--steps", 8, "--checkpoint-every", 4),
    ]


@pytest.fixture(scope="module")
def of_two(flags, tmp_path_factory):
    """The directory of a run of two processes with two devices each."""
    out = tmp_path_factory.mktemp("two") / "out"
    finish(*flags, "--out", out)
    return out


def losses(out):
    """Returns the losses of a run by step and name."""
    return {
        (line["step"], name): line[name]
        for line in read_lines(out)
        for name in ("loss", "validation_loss")
        if name in line
    }


def test_two_processes_train_like_one(flags, of_two, tmp_path):
    finish(*flags, "--out", tmp_path / "out", processes=1, devices=4)
    # The same sequences on each device; but processes add up in another order than
    # the threads of one, which is float32's rounding through eight updates.
    assert losses(of_two) == pytest.approx(losses(tmp_path / "out"), rel=1e-6)
    saved = json.loads((of_two / "config.json").read_text())
    assert "coordinator" not in saved
    names = {path.name for path in of_two.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "rel"),
    [(2, 2, "fsdp=4", 0), (1, 4, "data=2,fsdp=2", 1e-5)],
)
def test_a_checkpoint_of_two_processes_fits_any_number(
    processes, devices, mesh, rel, of_two, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(of_two, out)
    shutil.rmtree(out / "checkpoints/8")
    (out / "summary.json").unlink()
    words = ("--out", out, "--resume", "--mesh", mesh)
    finish(*words, processes=processes, devices=devices)
    assert losses(out) == pytest.approx(losses(of_two), rel=rel, abs=0)
    assert checkpoint_steps(out) == [4, 8]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The flags of a run that does not end by itself, and is compiled soon."""
    return [
        *write_inputs(tmp_path_factory.mktemp("inputs")),
        *("--optimizer", "adamw", "--mesh", "fsdp=4", "--checkpoint-every", 4),
        *("--steps", 100_000, "--eval-every", 100_000, "--log-every", 100),
        *("--warmup-steps", 0),
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other_with_a_line(victim, endless, tmp_path):
    out = tmp_path / "out"
    with running([*endless, "--out", out]) as found:
        wait_until(lambda: len(checkpoint_steps(out)) > 1)
        found[victim].kill()
        killed = time.monotonic()
        other = found[1 - victim]
        _, stderr = other.communicate(timeout=SECONDS)
        assert time.monotonic() - killed < TIMEOUT
    assert other.returncode == 1, stderr[-2000:]
    (line,) = errors(stderr)
    assert f"process {victim} of 2 has died" in line
    assert "--resume" in line
    kept = checkpoint_steps(out)[-1]
    # What the run had besides is gone on with, by another number of processes.
    words = ("--out", out, "--resume", "--steps", kept + 1, "--allow-changes")
    finish(*words, "--mesh", "data=1", processes=1, devices=1)
    assert checkpoint_steps(out)[-1] == kept + 1


def test_a_signal_to_one_process_saves_and_ends_all(endless, tmp_path):
    out = tmp_path / "out"
    with running([*endless, "--out", out]) as found:
        wait_until(lambda: len(checkpoint_steps(out)) > 1)
        found[1].send_signal(signal.SIGTERM)
        for status, stderr in ends(found):
            assert status == 0, stderr[-2000:]
    # Not the one of a checkpoint that was due.
    assert checkpoint_steps(out)[-1] > 4


def test_processes_with_different_flags_say_which(flags, tmp_path):
    words = [*flags, "--out", tmp_path / "out"]
    with running(words, own=[["--b1", 0.9], ["--b1", 0.8]]) as found:
        for status, stderr in ends(found):
            assert status == 2, stderr[-2000:]
            (line,) = errors(stderr)
            assert "process 1 has --b1 0.8, process 0 has 0.9" in line
    assert not (tmp_path / "out").exists()


def test_processes_with_other_data_say_so(flags, tmp_path):
    (tmp_path / "text.txt").write_text("of another text " * 700)
    given = dict(zip(flags[::2], flags[1::2], strict=True))["--data"]
    folders = [Path(given).parent, tmp_path]
    words = [*flags, "--out", tmp_path / "out", "--data", "text.txt"]
    with running(words, folders=folders) as found:
        for status, stderr in ends(found):
            assert status == 2, stderr[-2000:]
            (line,) = errors(stderr)
            assert "process 1 has --data text.txt with the digest" in line
            assert "give all the same files" in line
    assert not (tmp_path / "out").exists()


def test_processes_without_a_shared_directory_are_told(flags, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    words = [*flags, "--out", "out"]
    with running(words, folders=folders) as found:
        _, (status, stderr) = ends(found)
    assert status == 2, stderr[-2000:]
    (line,) = errors(stderr)
    assert "--out out of process 1 is not that of process 0" in line
    assert not checkpoint_steps(folders[0] / "out")


def test_a_coordinator_that_does_not_answer_is_named(flags, tmp_path):
    joined = ("--coordinator", "127.0.0.1:9", "--num-processes", 2, "--process-id", 1)
    words = [*flags, "--out", tmp_path / "out", *joined, "--process-timeout", 1]
    with running(words, 1) as found:
        ((status, stderr),) = ends(found)
    assert status == 2
    (line,) = errors(stderr)
    assert "--coordinator 127.0.0.1:9 has not answered for 1 s" in line
    assert not (tmp_path / "out").exists()
