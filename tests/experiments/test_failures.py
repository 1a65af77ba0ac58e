"""A full disk and memory that is used up: one line, and the last checkpoint whole."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.errors import JaxRuntimeError
from tensorboardX.record_writer import RecordWriter

from experiments.errors import UserError
from experiments.run import figures, metrics
from experiments.run.assemble import assemble
from experiments.run.checkpoint import read_record
from experiments.run.config import parse
from experiments.run.failures import check_fits
from tests.experiments.small_runs import one_error_line, run

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def flags(inputs, tmp_path):
    return [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_events(writer, data):
    # What opens the file is still written.
    writer.writes = getattr(writer, "writes", 0) + 1
    if writer.writes > 2:
        no_space()


class Full(io.StringIO):
    """A file on a full disk: neither writing nor closing works."""

    write = close = no_space


def full_metrics(patch):
    opened = Path.open

    def open_(path, *arguments, **options):
        if path.name == metrics.METRICS_FILE and "a" in arguments:
            return Full()
        return opened(path, *arguments, **options)

    patch.setattr(Path, "open", open_)


FULL = {
    "checkpoint": lambda patch: patch.setattr(
        "experiments.run.checkpoint.write_checksums", no_space
    ),
    "metrics": full_metrics,
    "events": lambda patch: patch.setattr(RecordWriter, "write", no_space_for_events),
    "summary": lambda patch: patch.setattr(
        "experiments.pretrain_llama.write_json", no_space
    ),
    "figures": lambda patch: patch.setattr(
        figures.FigureCanvasAgg, "print_png", no_space
    ),
}


@pytest.mark.parametrize("what", list(FULL))
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    what, flags, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        FULL[what](patch)
        assert run(*flags) == 2
    error = one_error_line(capsys)
    assert "No space left on device" in error
    assert "--resume" in error
    assert run("--out", tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out/summary.json").exists()


def test_a_save_that_fails_leaves_the_checkpoint_before_it(
    flags, tmp_path, capsys, monkeypatch
):
    assert run(*flags, "--steps", 2) == 0
    monkeypatch.setattr("experiments.run.checkpoint.write_checksums", no_space)
    assert run(*flags, "--resume") == 2
    assert "cannot write a checkpoint" in one_error_line(capsys)
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.progress["step"] == 2
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["2"]


def exhausted(*arguments, **options):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")


MEMORY = {
    "at the start": "experiments.run.loop.initial_state",
    "compiling": "experiments.run.compiled.make_train_step",
    "on a step": "experiments.run.compiled.Programs.train_step",
}


@pytest.mark.parametrize("where", list(MEMORY))
def test_memory_that_is_used_up_is_one_line_with_the_plan_and_the_flags(
    where, flags, capsys, monkeypatch
):
    monkeypatch.setattr(MEMORY[where], exhausted)
    assert run(*flags) == 2
    error = one_error_line(capsys)
    assert "out of memory" in error
    for word in ("--batch-size below 8", "--accumulate above 1", "--remat"):
        assert word in error
    assert "GB of parameters" in error
    # Which is known once the step is compiled.
    assert ("GB at the peak of the compiled step" in error) == (where == "on a step")
    assert f"{jax.devices()[0].device_kind} has" in error


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(
    flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("experiments.run.failures._bytes_of", lambda device: 1e5)
    monkeypatch.setattr("experiments.run.loop.Loop.__init__", exhausted)
    assert run(*flags) == 2
    error = one_error_line(capsys)
    # 12,144 parameters, three times in float32, and counters.
    assert "this machine needs 0.000 GB" in error
    assert "the state of adamw" in error
    assert "a larger fsdp in --mesh" in error
    assert not (tmp_path / "out/config.json").exists()


def test_what_is_left_of_a_compacted_state_counts(flags, monkeypatch):
    parts = assemble(parse([*map(str, flags), "--mesh", "data=1"]), lambda text: None)
    # Parameters of 48,576 bytes, and a state of twice as many and counters.
    monkeypatch.setattr("experiments.run.failures._bytes_of", lambda device: 60_000)
    with pytest.raises(UserError, match="by the plan, but has"):
        check_fits(parts)
    progress = {"compaction": {"done": [{"bytes_after": 11_000}]}}
    compacted: Any = SimpleNamespace(progress=progress)
    check_fits(dataclasses.replace(parts, resumed=compacted))
    progress["compaction"]["done"].append({"bytes_after": 12_000})
    with pytest.raises(UserError, match="does not fit"):
        check_fits(dataclasses.replace(parts, resumed=compacted))


def test_another_error_of_the_device_is_none_of_memory(flags, monkeypatch):
    def broken(*arguments, **options):
        raise JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("experiments.run.loop.initial_state", broken)
    with pytest.raises(JaxRuntimeError, match="something else"):
        run(*flags)


@pytest.mark.slow
def test_a_process_that_may_write_no_large_file_complains_in_one_line(flags, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "bash", sys.executable]
    done = subprocess.run(
        [*limited, "-m", "experiments.pretrain_llama", *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: cannot write")
    assert read_record(tmp_path / "out") is None
