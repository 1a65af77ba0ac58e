"""The lock of a run's directory: who has it, and whether it is still there."""

import os
import shutil
import subprocess
import sys

import pytest

from experiments.errors import UserError
from experiments.run.lock import Lock
from experiments.run.terminal import TrainingProgress
from tests.experiments.small_runs import one_error_line, run

HOLD = "import sys, time; from pathlib import Path; \
from experiments.run.lock import Lock; lock = Lock(Path(sys.argv[1])); \
print('held', flush=True); time.sleep(60)"


def test_a_directory_is_one_process_s_until_it_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on \S"):
            Lock(tmp_path)
        # Nor is what it says of its holder lost.
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on \S"):
            Lock(tmp_path)
        process.kill()
    with Lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    with Lock(tmp_path) as lock:
        lock.check()


def test_a_lock_notices_that_its_directory_is_gone_or_another(tmp_path):
    with Lock(tmp_path / "run") as lock:
        lock.check()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="run was deleted while"):
            lock.check()
        with Lock(tmp_path / "run"), pytest.raises(UserError, match="was deleted"):
            lock.check()


@pytest.mark.usefixtures("one_device")
def test_a_run_whose_directory_is_in_use_or_deleted_ends_with_an_error(
    inputs, tmp_path, monkeypatch, capsys
):
    flags = [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]
    with Lock(tmp_path / "out"):
        assert run(*flags) == 2
        assert f"in use by process {os.getpid()}" in one_error_line(capsys)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]

    def advance(self, now):
        if now == 2:
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(TrainingProgress, "advance", advance)
    assert run(*flags) == 2
    assert "out was deleted while the run wrote to it" in one_error_line(capsys)


@pytest.mark.usefixtures("one_device")
def test_what_another_process_did_before_the_lock_was_there_is_not_overwritten(
    inputs, tmp_path, monkeypatch, capsys
):
    def lock(directory):
        (directory / "checkpoints/3").mkdir(parents=True)
        return Lock(directory)

    monkeypatch.setattr("experiments.run.command.Lock", lock)
    assert run(*inputs, "--optimizer", "adamw", "--out", tmp_path / "out") == 2
    assert "another process has written to --out" in one_error_line(capsys)
    assert not (tmp_path / "out/config.json").exists()
