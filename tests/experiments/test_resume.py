"""Runs that are continued: after a kill, with other paths, longer, otherwise."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments.run.files import checkpoint_steps
from tests.experiments.small_runs import (
    assert_same_run,
    one_error_line,
    read_lines,
    run,
)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def flags(inputs):
    return [*inputs, "--optimizer", "adamw", "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The directory of a run of 4 steps with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        import jax

        device = jax.local_devices()[:1]
        patch.setattr("experiments.distribution.mesh.all_devices", lambda: device)
        assert run(*flags, "--out", out) == 0
    return out


@pytest.fixture
def half(finished, tmp_path):
    """A copy of that run as it was after step 2."""
    out = tmp_path / "half"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints/4")
    (out / "summary.json").unlink()
    return out


def read(directory, name="summary.json"):
    return json.loads((directory / name).read_text())


def test_the_same_command_recovers_a_run_killed_before_its_first_checkpoint(
    flags, finished, tmp_path, die_at, capsys
):
    out = tmp_path / "out"
    command = [*flags, "--out", out, "--resume"]
    with pytest.raises(die_at(2)):
        run(*command)
    assert (out / "metrics.jsonl").stat().st_size > 0
    (out / "checkpoints/2.orbax-checkpoint-tmp").mkdir()
    die_at(None)
    # Without --resume its lines are results.
    assert run(*command[:-1]) == 2
    assert "holds another run; continue it with --resume" in one_error_line(capsys)
    assert run(*command) == 0
    assert "no checkpoint: the run starts" in " ".join(capsys.readouterr().out.split())
    assert_same_run(finished, out, 4)
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_a_directory_says_the_rest_of_its_run(half, finished):
    assert run("--out", half, "--resume") == 0
    assert_same_run(finished, half, 4)
    assert read(half, "config.json") == {
        **read(finished, "config.json"),
        **{"out": str(half), "resume": True},
    }


def test_another_path_to_the_same_text_changes_nothing(half, finished, flags, tmp_path):
    text = Path(flags[flags.index("--data") + 1])
    shutil.copy(text, tmp_path / "moved.txt")
    assert run("--out", half, "--resume", "--data", tmp_path / "moved.txt") == 0
    assert_same_run(finished, half, 4)
    assert read(half)["changes"] == []


def test_a_finished_run_is_extended_and_what_follows_is_resumed_bit_for_bit(
    finished, flags, tmp_path, die_at, capsys
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for out in (whole, halves):
        shutil.copytree(finished, out)
    longer = [*flags, "--steps", 8, "--resume", "--out"]
    assert run(*longer, whole) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "from step 4 on --steps was 4, is 8; the learning rate there is" in said

    with pytest.raises(die_at(7)):
        run(*longer, halves)
    die_at(None)
    assert run("--out", halves, "--resume") == 0
    assert_same_run(whole, halves, 8)

    change = {"step": 4, "settings": {"steps": [4, 8]}}
    for out in (whole, halves):
        assert read(out)["changes"] == read(out, "config.json")["changes"] == [change]
        assert read(out)["steps"] == 8
    # The rates behind step 4 are those of a run of 8 steps with the warm-up of 4.
    new = tmp_path / "new"
    assert run(*flags, "--steps", 8, "--warmup-steps", 2, "--out", new) == 0
    # Line 0 is the validation before the first step.
    rates = [[r["learning_rate"] for r in read_lines(x)[1:]] for x in (whole, new)]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][:4] != rates[1][:4]


def test_other_settings_are_refused_by_name_or_allowed_by_a_flag_and_recorded(
    half, capsys
):
    command = ["--out", half, "--resume", "--learning-rate", 0.5, "--b1", 0.8]
    before = sorted((path, path.stat().st_mtime_ns) for path in half.rglob("*"))
    assert run(*command) == 2
    error = one_error_line(capsys)
    assert "--b1 was 0.9, is 0.8, --learning-rate was 0.008, is 0.5;" in error
    assert "--allow-changes" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in half.rglob("*")) == before

    assert run(*command, "--allow-changes", "--log-every", 2) == 0
    settings = {"b1": [0.9, 0.8], "learning_rate": [0.008, 0.5]}
    assert read(half)["changes"] == [{"step": 2, "settings": settings}]
    # It is not allowed once and for all.
    assert run("--out", half, "--resume", "--b1", 0.7) == 2
    assert "--b1 was 0.8, is 0.7" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", 1], "--seed was 0, is 1; its checkpoint fits no other"),
        (["--batch-size", 16], "--batch-size was 8, is 16; its checkpoint fits"),
        (
            ["--steps", 1, "--warmup-steps", 0],
            "--steps 1: the run in .* has done 2 already",
        ),
        (["--clip-norm", "None"], "does not fit this run"),
    ],
)
def test_no_flag_allows_what_the_checkpoint_does_not_fit(
    changed, message, half, capsys
):
    assert run("--out", half, "--resume", "--allow-changes", *changed) == 2
    error = one_error_line(capsys)
    assert re.search(message, error), error


def test_fewer_steps_are_a_change_as_others(half, capsys):
    assert run("--out", half, "--resume", "--steps", 3) == 2
    assert "--steps was 4, is 3; leave these flags out" in one_error_line(capsys)


def test_the_best_checkpoint_is_kept_and_said(flags, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 3.6, 3.2])
    monkeypatch.setattr("experiments.run.text.mean_loss", lambda summed: next(losses))
    keep_best = ["--keep-best", "--keep-checkpoints", 1, "--eval-every", 1]
    out = tmp_path / "out"
    assert run(*flags, *keep_best, "--checkpoint-every", 100, "--out", out) == 0
    best = read(out)["best"]
    assert (best["step"], best["validation_loss"]) == (1, 3.0)
    assert checkpoint_steps(out) == [1, 4]
    # A process that continues knows the best one of the processes before it.
    assert run("--out", out, "--resume", "--steps", 5) == 0
    best = read(out)["best"]
    assert (best["step"], best["validation_loss"]) == (1, 3.0)
    assert checkpoint_steps(out) == [1, 5]


def test_the_clock_makes_checkpoints_too(flags, finished, tmp_path, die_at):
    command = [*flags, "--out", tmp_path / "out", "--checkpoint-every", 100]
    with pytest.raises(die_at(4)):
        run(*command, "--checkpoint-minutes", 1e-9, "--keep-checkpoints", 9)
    assert checkpoint_steps(tmp_path / "out") == [1, 2, 3]
    die_at(None)
    assert run("--out", tmp_path / "out", "--resume") == 0
    assert_same_run(finished, tmp_path / "out", 4)
