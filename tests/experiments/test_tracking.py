"""What follows a run beside its files: W&B, a profile, the terminal."""

import io
import sys
import types

import pytest
from rich.console import Console

from experiments.run.config import parse
from experiments.run.profile import Profile
from experiments.run.terminal import TrainingProgress
from experiments.run.text import TextWork
from tests.experiments.small_runs import one_error_line, run


class FakeWandb(types.ModuleType):
    """Keeps what it is told, as W&B's servers do."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.started, self.rows, self.ended = [], [], []
        self.is_logged_in = True

    def init(self, **settings):
        if not self.is_logged_in:
            raise self.Error("api_key not configured (no-tty)")
        self.started.append(settings)
        return types.SimpleNamespace(
            id=settings["id"] or "fresh",
            define_metric=lambda name, step_metric: None,
            log=self.rows.append,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.usefixtures("one_device")
def test_wandb_gets_each_line_and_a_resumed_run_is_the_same_one(
    inputs, tmp_path, wandb, stop_at
):
    flags = [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]
    flags += ["--wandb", "trial"]
    stop_at(2)
    assert run(*flags) == 0
    assert [row["step"] for row in wandb.rows] == [0, 1, 2]
    stop_at(None)
    assert run(*flags, "--resume") == 0
    assert [row["step"] for row in wandb.rows] == [0, 1, 2, 3, 4]

    first, second = wandb.started
    assert (first["id"], second["id"]) == (None, "fresh")
    assert first["project"] == second["project"] == "trial"
    assert first["resume"] == "allow"
    assert first["dir"] == tmp_path / "out"
    assert first["config"]["optimizer"] == "adamw"
    assert wandb.ended == [0, 0]
    groups = {name.partition("/")[0] for row in wandb.rows for name in row}
    assert groups == {"step", "train", "eval"}
    assert wandb.rows[-1]["eval/loss"] < wandb.rows[0]["eval/loss"]


@pytest.mark.usefixtures("one_device")
def test_wandb_that_refuses_is_told_in_one_line(inputs, tmp_path, wandb, capsys):
    wandb.is_logged_in = False
    flags = [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]
    assert run(*flags, "--wandb", "trial") == 2
    error = one_error_line(capsys)
    assert "--wandb trial: W&B cannot start (api_key not configured" in error
    assert "WANDB_MODE=offline" in error
    # The same command without it, or when it works, starts the run.
    assert run(*flags) == 0


@pytest.mark.usefixtures("one_device")
def test_a_run_that_fails_is_a_failed_one_in_wandb(
    inputs, tmp_path, wandb, monkeypatch
):
    def advance(self, step):
        raise KeyError(step)

    monkeypatch.setattr(TrainingProgress, "advance", advance)
    flags = [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]
    with pytest.raises(KeyError):
        run(*flags, "--wandb", "trial")
    assert wandb.ended == [1]


def test_wandb_is_imported_only_where_it_is_asked_for(
    inputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # An import fails.
    assert parse([]).wandb is None
    assert run(*inputs, "--wandb", "trial", "--out", tmp_path / "out") == 2
    error = one_error_line(capsys)
    assert "--wandb needs Weights & Biases; install it with pip install" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_device")
def test_a_profile_of_some_steps_is_written_and_named(inputs, tmp_path, capsys):
    flags = [*inputs, "--optimizer", "adamw", "--out", tmp_path / "out"]
    assert run(*flags, "--profile", "2:3") == 0
    found = list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    assert len(found) == 1
    assert f"profile in {tmp_path / 'out/profile'};" in capsys.readouterr().out


@pytest.fixture
def traces(monkeypatch):
    """Notes the traces that are started and stopped."""
    notes = []
    jax_profiler = "experiments.run.profile.jax.profiler"
    monkeypatch.setattr(f"{jax_profiler}.start_trace", lambda _: notes.append("start"))
    monkeypatch.setattr(f"{jax_profiler}.stop_trace", lambda: notes.append("stop"))
    return notes


@pytest.mark.parametrize(
    ("spec", "first", "expected"),
    [
        ("2:3", 1, [1, "start", 2, 3, "stop", 4]),
        ("1:1", 1, ["start", 1, "stop", 2, 3, 4]),
        # Resumed in the middle; resumed behind it; ended before it does.
        ("1:3", 3, ["start", 3, "stop", 4]),
        ("1:2", 3, [3, 4]),
        ("3:9", 1, [1, 2, "start", 3, 4, "stop"]),
        (None, 3, [3, 4]),
    ],
)
def test_the_steps_of_a_profile(spec, first, expected, traces, tmp_path):
    waits = []
    with Profile(spec, tmp_path, lambda line: None) as profile:
        for step in range(first, 5):
            profile.before(step, lambda: waits.append("before"))
            traces.append(step)
            profile.after(step, lambda: waits.append("after"))
    assert traces == expected
    # No step of before is in the trace, and all of its own are.
    assert len(waits) == expected.count("start") + ("stop" in expected[:-1])


def shown_in(console, steps=100):
    """Returns what a run of two logged steps prints."""
    record = {
        **{"step": 1, "loss": 5.5, "tokens_per_second": 1234.5, "mfu": None},
        "memory_in_use_bytes": None,
    }
    with TrainingProgress(console, steps) as shown:
        shown.advance(1)
        shown.show(record)
        shown.advance(steps)
        known = {"mfu": 0.4125, "memory_in_use_bytes": 12_340_000_000}
        shown.show({**record, "step": steps, "loss": 2.5, **known})
    return console.file.getvalue()


def test_a_log_file_has_plain_lines():
    text = shown_in(Console(file=io.StringIO(), width=40))
    assert text.splitlines() == [
        "step 1/100  loss 5.500  1,234 tokens/s",
        "step 100/100  loss 2.500  1,234 tokens/s  MFU 41.2%  12.3 GB  0:00 left",
    ]


def test_a_terminal_has_a_bar_that_fits():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    text = shown_in(console)
    assert "MFU 41.2%" in text
    assert "0:00 left" in text
    assert "…" not in text


def test_the_time_left_is_that_of_the_pace_with_all_that_stops_it(monkeypatch):
    now = iter([1000.0, 1040.0])
    monkeypatch.setattr("experiments.run.terminal.time.monotonic", lambda: next(now))
    console = Console(file=io.StringIO())
    shown = TrainingProgress(console, 1001)
    # In 40 s from step 1 to step 11: 4 s a step, 990 steps to go.
    shown.advance(1)
    record = {"step": 11, "loss": 1.0, "tokens_per_second": 1.0, "mfu": None}
    shown.show({**record, "memory_in_use_bytes": None})
    assert "1:06:00 left" in console.file.getvalue()


def test_a_validation_is_told_with_its_perplexity():
    console = Console(file=io.StringIO())
    shown = TrainingProgress(console, 10)
    told = {"validation_perplexity": 7.389, "validation_bits_per_byte": 1.5}
    shown.validated(0, 2.0, TextWork.told(None, told))
    told["validation_bits_per_byte"] = None
    shown.validated(7, 2.0, TextWork.told(None, told))
    assert console.file.getvalue().splitlines() == [
        "validation loss 2.0000 at first (perplexity 7.39, 1.500 bits per byte)",
        "validation loss 2.0000 at step 7 (perplexity 7.39)",
    ]
