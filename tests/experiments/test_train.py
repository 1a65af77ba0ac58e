"""Whole runs through the command line: resumed ones equal those never interrupted."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.optim import compaction
from experiments.run.files import checkpoint_steps
from experiments.run.progress import Progress, saved_progress
from tests.experiments.small_runs import (
    assert_same_run,
    read_lines,
    read_state,
    run,
    write_inputs,
)

# A refresh falls on step 3, so that step 2 is in the middle of a period.
REFRESH = {
    "adamw": [],
    "optax_galore": ["--update-proj-gap", 2],
    "galore": ["--update-proj-gap", 2, "--gradients", "subspace"],
    "galore, sketches": [
        *("--update-proj-gap", 2, "--gradients", "subspace", "--refresh", "sketch"),
    ],
    "adarankgrad": ["--min-refresh-interval", 2, "--max-refresh-interval", 2],
    "vlorp": ["--update-proj-gap", 2, "--granularity", 2, "--rank", 2],
    "projfactor": [
        *("--update-proj-gap", 2, "--granularity", 2, "--rank", 2),
        *("--accumulate", 2, "--gradients", "subspace"),
    ],
}
COMPILE_LONG = {"adarankgrad", "vlorp", "projfactor"}
OPTIMIZERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in COMPILE_LONG else [])
    for name in REFRESH
]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_steps_and_two_resumed_equal_four(optimizer, inputs, tmp_path, stop_at):
    flags = [*inputs, "--optimizer", optimizer.split(",")[0], *REFRESH[optimizer]]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(*flags, "--out", whole) == 0

    stop_at(2)
    assert run(*flags, "--out", halves) == 0
    assert not (halves / "checkpoints/4").exists()
    stop_at(None)
    assert run(*flags, "--out", halves, "--resume") == 0

    assert_same_run(whole, halves, 4)
    assert any(not np.array_equal(*pair) for pair in _parameters(halves, 2, 4))


def test_the_progress_of_an_earlier_version_is_read():
    """It had names; without a register all bases count as due, and a step asks."""
    known = {"due": [["['w']"], [], []], "renewed_at": {"['w']": 3}}
    saved = dataclasses.asdict(Progress(step=5)) | {"renewals": known}
    assert saved_progress(saved) == Progress(step=5)
    register = [[0, 1], [0, 0], [2, 0]]
    assert saved_progress({**saved, "renewals": register}).renewals == register


MEMORY = {
    "low bits": [
        *("--optimizer", "galore", "--update-proj-gap", 2, "--param-dtype", "bfloat16"),
        *("--moment-bits", 8, "--basis-bits", 4, "--vocabulary-optimizer", "low_bit"),
    ],
    "compaction": [
        *("--min-refresh-interval", 2, "--max-refresh-interval", 2),
        *("--threshold", 0.9, "--min-rank", 1, "--gradients", "subspace"),
        *("--compact", "--compact-every", 1),
    ],
}


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_resumed_bit_for_bit(name, inputs, tmp_path, stop_at, monkeypatch):
    # Of 6 columns 4 are left at the first look, and 4 at the next ones: one change.
    for constant, value in (("BUCKET", 4), ("LOOKS", 1), ("MIN_SAVING", 0.0)):
        monkeypatch.setattr(compaction, constant, value)
    flags = [*inputs, *MEMORY[name]]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(*flags, "--out", whole) == 0
    stop_at(2)
    assert run(*flags, "--out", halves) == 0
    stop_at(None)
    assert run(*flags, "--out", halves, "--resume") == 0
    assert_same_run(whole, halves, 4)

    summary = json.loads((whole / "summary.json").read_text())
    # Line 0 is the validation before the first step.
    sizes = [line["optimizer_state_bytes"] for line in read_lines(whole)[1:]]
    changes = [entry["step"] for entry in summary["compactions"]]
    assert summary["compilations"] == 1 + len(changes)
    if name == "compaction":
        # A step is logged before the look at the state that follows it.
        assert changes[0] == 1
        assert sizes[0] > sizes[1] >= sizes[2] >= sizes[3]
        entry = summary["compactions"][0]
        assert (entry["bytes_before"], entry["bytes_after"]) == (sizes[0], sizes[1])
        resumed = json.loads((halves / "summary.json").read_text())
        assert resumed["compactions"] == summary["compactions"]
        assert resumed["compilations"] == 1 + sum(step > 2 for step in changes)
    else:
        assert changes == []
        assert len(set(sizes)) == 1


def _parameters(directory, *steps):
    states = [read_state(directory, step) for step in steps]
    paths = [path for path in states[0] if path.startswith("['params']")]
    return [[state[path] for state in states] for path in paths]


@pytest.mark.usefixtures("one_device")
def test_sigint_saves_says_how_to_resume_and_exits_130(
    inputs, tmp_path, stop_at, capsys
):
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_at(1, signal.SIGINT)
    assert run(*inputs, "--optimizer", "adamw", "--out", tmp_path / "out") == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old
    said = capsys.readouterr().out
    assert "SIGINT: the run finishes its step" in said
    assert "stopped by SIGINT and saved at step 1" in said
    # The interpreter is this one, and config.json says the rest.
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = f"{python} -m experiments.pretrain_llama"
    assert said.endswith(f"\n  {program} --out {tmp_path / 'out'} --resume\n")
    assert checkpoint_steps(tmp_path / "out") == [1]


@pytest.mark.usefixtures("one_device")
def test_gradients_that_stay_non_finite_end_the_run_and_keep_the_checkpoint(
    inputs, tmp_path, capsys
):
    del inputs  # Only for the compiled programs.
    flags = write_inputs(tmp_path, scale=float("nan"))
    out = tmp_path / "out"
    flags += ["--optimizer", "adamw", "--steps", 40, "--checkpoint-every", 9]
    assert run(*flags, "--out", out) == 2
    error = capsys.readouterr().err
    assert "the gradients of 20 steps in a row" in error
    assert "--learning-rate" in error
    assert checkpoint_steps(out) == [9, 18]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[5])["rejected_updates"] == 5
    assert json.loads(lines[5])["loss"] is None
