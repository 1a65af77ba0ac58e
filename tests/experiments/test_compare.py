"""The comparison: its search, what it skips, what it refuses, and its table."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:
    fcntl = None

from experiments import compare
from experiments.arguments import words_of
from experiments.comparison import suites
from experiments.comparison.flags import fields_of
from experiments.comparison.ledger import Ledger, best_rates, rates_of
from experiments.comparison.measures import LOSS, METRIC
from experiments.comparison.processes import Processes
from experiments.comparison.report import table
from experiments.comparison.rows import front, rows_of
from experiments.comparison.search import best_point, next_point
from experiments.comparison.trainers import TUNER
from experiments.errors import UserError
from experiments.optim.methods import OPTIMIZERS
from experiments.run.config import complete, parse
from experiments.run.settings import to_json
from experiments.tuning.config import TUNING
from experiments.tuning.flags import TuningConfig
from tests.experiments.small_runs import one_error_line, write_inputs

ROOT = Path(__file__).parents[2]


def searched(loss, most):
    """Returns the points that a search tries, in order, and the best."""
    losses = {}
    while (point := next_point(losses, most)) is not None:
        assert point not in losses
        losses[point] = loss(point)
    return losses, best_point(losses)


def bowl(center):
    def loss(point):
        return 1 + (point[0] - center[0]) ** 2 + (point[1] - center[1]) ** 2

    return loss


@pytest.mark.parametrize("center", [(0, 0), (1, -2), (-2, 1), (0, 3)])
def test_the_search_ends_where_no_neighbour_is_better(center):
    losses, best = searched(bowl(center), 100)
    assert best == center
    around = [(best[0] + x, best[1] + y) for x, y in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    assert all(point in losses for point in around)


def test_a_method_gets_no_more_runs_than_the_others():
    losses, _ = searched(bowl((5, 5)), 6)
    assert len(losses) == 6
    assert len(searched(bowl((0, 0)), 6)[0]) == 5
    assert searched(bowl((0, 0)), 1) == ({(0, 0): 1}, (0, 0))


def test_rates_that_diverge_are_left_behind():
    losses, best = searched(lambda p: math.inf if p[1] > -2 else 2.0 + p[1] ** 2, 20)
    # Where all around diverges too, the start stands.
    assert best == (0, 0)
    assert len(losses) == 5
    _, best = searched(lambda p: math.inf if p[1] > -1 else bowl((0, -2))(p), 20)
    assert best == (0, -2)


def test_an_interrupted_search_goes_on_alike():
    whole, _ = searched(bowl((1, -2)), 100)
    for done in range(len(whole)):
        # In whatever order they are read back.
        losses = list(whole.items())[:done]
        random.Random(done).shuffle(losses)
        assert next_point(dict(losses), 100) == list(whole)[done]


# --- the runs, each a function in the place of a process ----------------------------

SUITE = suites.Suite(
    "two methods",
    {"model": "tiny", "steps": 10},
    (
        suites.Contender("adamw", {"optimizer": "adamw"}, 0.125),
        suites.Contender("sumo 8 bits", {"optimizer": "sumo", "moment_bits": 8}, 1.0),
    ),
    seeds=(0, 1),
    search=4,
)
DIVERGES = {("sumo", 0.016)}


@pytest.fixture
def started(monkeypatch):
    """Runs of the suite are functions; returns the list of those that were started."""
    monkeypatch.setitem(suites.SUITES, "cpu-small", SUITE)
    calls = []

    def process(self, flags, log):
        arguments = dict(zip(flags[::2], flags[1::2], strict=False))
        if flags[-1] == "--resume":
            arguments["--resume"] = True
        calls.append(arguments)
        return write_run(arguments, log)

    monkeypatch.setattr(Processes, "run", process)
    return calls


def write_run(arguments, log):
    """Writes what a run leaves behind; its loss is a bowl of the rates."""
    directory = Path(arguments["--out"])
    assert directory.exists() == ("--resume" in arguments)
    directory.mkdir(exist_ok=True)
    rest = float(arguments["--learning-rate"])
    blocks = rest * float(arguments["--block-scale"])
    loss = 2 + abs(math.log2(blocks / 0.002)) + 0.01 * int(arguments["--seed"])
    diverges = (arguments["--optimizer"], round(blocks, 6)) in DIVERGES
    lines = [
        {"step": 1, "tokens": 80, "loss": 5.0, "tokens_per_second": 10.0},
        {
            **{"step": 10, "tokens": 800, "tokens_per_second": 20.0},
            **{"loss": None if diverges else loss, "ranks": {"a": [4, 2], "b": 1}},
            **({} if diverges else {"validation_loss": loss}),
        },
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    (directory / "config.json").write_text(json.dumps({"steps": 10}))
    if diverges:
        log.write_text("error: the gradients of 20 steps in a row were not finite")
        return 2
    summary = {
        **{"validation_loss": loss, "initial_validation_loss": 5.5, "steps": 10},
        **{"tokens_per_second": 20.0, "model": "tiny", "data": "text", "device": "cpu"},
        **{"optimizer_state_bytes": 50, "adamw_state_bytes": 100},
        **{"block_state_bytes": 20, "block_adamw_state_bytes": 80},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "checkpoints/10").mkdir(parents=True, exist_ok=True)
    return 0


def run(tmp_path, *flags):
    return compare.main(["cpu-small", "--out", str(tmp_path / "out"), *flags])


def results(tmp_path):
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda r: r["directory"])


def test_each_method_is_searched_and_its_best_rates_run_with_all_seeds(
    started, tmp_path
):
    assert run(tmp_path) == 0
    rows = {row.method: row for row in rows_of(results(tmp_path))}
    # Starts at 0.001, doubles to the best; 0.008 halves to it.
    assert rows["adamw"].block_learning_rate == 0.002
    assert rows["sumo 8 bits"].block_learning_rate == 0.002
    for row in rows.values():
        assert row.losses == (2.0, 2.01)
        assert row.spread == pytest.approx(0.01)
        assert row.block_share == 0.25
        assert row.tried == 5
    assert rows["sumo 8 bits"].diverged == ((0.008, 0.016, 1),)
    # Both searches, 4 runs each, come before any second seed.
    assert [call["--seed"] for call in started] == [*"00000000", *"11"]
    assert not list((tmp_path / "out/runs").glob("*/checkpoints"))
    curve = results(tmp_path)[0]["validation_curve"]
    # 80 tokens at 10 a second, 720 at 20.
    assert curve == [[800, 44.0, pytest.approx(3.0)]]
    assert results(tmp_path)[0]["rank_curve"] == [[10, 2.0]]


def test_the_table_says_what_was_run_and_what_diverged(started, tmp_path):
    del started
    assert run(tmp_path) == 0
    text = (tmp_path / "out/table.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| sumo 8 bits"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == [
        *("sumo 8 bits", "0.008, 0.002", "2.0050", "2", "0.0100", "+0.00 %"),
        *("0.250", "0.500", "20", "5", "0.008, 0.016 after step 1"),
    ]
    figures = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert figures == {
        "loss-tokens.svg",
        "loss-time.svg",
        "loss-bytes.svg",
        "ranks.svg",
    }


@pytest.mark.parametrize("stop_after", [0, 1, 4, 9])
def test_an_interrupted_comparison_resumed_has_the_same_table(
    started, tmp_path, monkeypatch, stop_after
):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole) == 0
    started.clear()
    process = Processes.run

    def interrupted(self, flags, log):
        if len(started) == stop_after:
            # A run that was stopped before its first checkpoint.
            Path(flags[flags.index("--out") + 1]).mkdir()
            raise KeyboardInterrupt
        return process(self, flags, log)

    monkeypatch.setattr(Processes, "run", interrupted)
    assert run(tmp_path) == 128 + signal.SIGINT
    monkeypatch.setattr(Processes, "run", process)
    assert run(tmp_path) == 0
    assert len(started) == 10, "a run that was done was run again"
    assert results(tmp_path) == results(whole)
    tables = [(x / "out/table.md").read_text() for x in (tmp_path, whole)]
    assert tables[0] == tables[1]
    assert run(tmp_path) == 0
    assert len(started) == 10


def test_several_at_a_time_come_to_the_same_table(started, tmp_path):
    del started
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert run(one) == 0
    assert run(two, "--jobs", "2") == 0
    assert (one / "out/table.md").read_text() == (two / "out/table.md").read_text()


def test_rates_of_another_comparison_are_taken_without_a_search(started, tmp_path):
    assert run(tmp_path) == 0
    started.clear()
    flags = ["--rates-from", str(tmp_path / "out"), "--data", "other"]
    (tmp_path / "other").mkdir()
    assert run(tmp_path / "other", *flags) == 0
    rates = {float(call["--block-scale"]) for call in started}
    assert len(started) == 4
    assert rates == {0.25}
    flags = ["--rates-from", str(tmp_path / "nowhere"), "--only", "adamw"]
    assert run(tmp_path / "third", *flags) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["cpu-smal"], "error: suite 'cpu-smal' is not known"),
        (["papers-60m"], "papers-60m needs --tokenizer"),
        (["cpu-small", "--only", "adamv"], "did you mean adamw?"),
        (["cpu-small", "--jobs", "0"], "--jobs must be at least 1"),
        (["cpu-small", "--job", "2"], "did you mean --jobs?"),
        (["cpu-small", "--rates-from", "nowhere"], "--rates-from nowhere holds no"),
        ([], "error: Missing from python -m experiments.compare: {cpu-small"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert compare.main(flags) == 2
    assert message in one_error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_another_comparisons_directory_is_not_touched(started, tmp_path, capsys):
    assert run(tmp_path, "--only", "adamw") == 0
    before = results(tmp_path)
    capsys.readouterr()
    assert run(tmp_path, "--data", "other") == 2
    assert "data was embedded, is other" in one_error_line(capsys)
    assert results(tmp_path) == before
    # More methods of the same suite may join.
    count = len(started)
    assert run(tmp_path) == 0
    assert len(started) == 10 > count


def test_a_run_that_fails_for_another_reason_stops_and_is_named(
    started, tmp_path, monkeypatch, capsys
):
    del started

    def process(self, flags, log):
        log.write_text("error: --data nowhere: no such file")
        return 2

    monkeypatch.setattr(Processes, "run", process)
    assert run(tmp_path, "--only", "adamw") == 2
    error = one_error_line(capsys)
    assert "adamw-0.008-0.001-0-" in error
    assert "ended with status 2" in error
    assert ".log says why" in error


def test_a_run_that_was_stopped_from_outside_is_not_taken_for_diverged(
    started, tmp_path, monkeypatch, capsys
):
    process = Processes.run

    def stopped(self, flags, log):
        process(self, flags, log)
        (Path(flags[flags.index("--out") + 1]) / "summary.json").unlink()
        log.write_text("stopped by SIGTERM and saved at step 10")
        return 0

    monkeypatch.setattr(Processes, "run", stopped)
    assert run(tmp_path, "--only", "adamw") == 2
    assert "ended with status 0" in one_error_line(capsys)
    assert not (tmp_path / "out/results.jsonl").exists()
    monkeypatch.setattr(Processes, "run", process)
    started.clear()
    assert run(tmp_path, "--only", "adamw") == 0
    assert len(started) == 5
    assert [call.get("--resume", False) for call in started] == [True] + 4 * [False]


def test_a_method_whose_settings_have_changed_is_run_again(
    started, tmp_path, monkeypatch, capsys
):
    assert run(tmp_path) == 0
    first, second = SUITE.contenders
    changed = dataclasses.replace(second, flags={**second.flags, "momentum": 0.9})
    suite = dataclasses.replace(SUITE, contenders=(first, changed))
    monkeypatch.setitem(suites.SUITES, "cpu-small", suite)
    started.clear()
    assert run(tmp_path) == 0
    assert [call["--momentum"] for call in started] == 5 * ["0.9"]
    assert "5 results are of settings" in capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text().count("| 5 |") == 2
    # A default of the method counts as much as a flag.
    method = OPTIMIZERS["adamw"]
    changed = dataclasses.replace(method, own={"momentum": 0.5})
    monkeypatch.setitem(OPTIMIZERS, "adamw", changed)
    started.clear()
    assert run(tmp_path, "--only", "adamw") == 0
    assert len(started) == 5


def test_results_from_before_an_option_without_a_default_are_kept(
    started, tmp_path, monkeypatch
):
    assert run(tmp_path) == 0
    table = (tmp_path / "out/table.md").read_text()
    count = len(started)
    method = OPTIMIZERS["adamw"]
    later = dataclasses.replace(method, own={**method.own, "update_proj_gap": None})
    monkeypatch.setitem(OPTIMIZERS, "adamw", later)
    assert run(tmp_path) == 0
    assert len(started) == count
    assert (tmp_path / "out/table.md").read_text() == table


def test_a_search_goes_on_under_a_higher_limit(started, tmp_path, monkeypatch):
    suite = dataclasses.replace(SUITE, search=2)
    monkeypatch.setitem(suites.SUITES, "cpu-small", suite)
    assert run(tmp_path) == 0
    few = len(started)
    monkeypatch.setitem(suites.SUITES, "cpu-small", SUITE)
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "out/suite.json").read_text())["search"] == 4
    assert few < len(started) == len(results(tmp_path))


def test_what_was_cut_off_is_run_again(started, tmp_path):
    assert run(tmp_path) == 0
    path = tmp_path / "out/results.jsonl"
    before = results(tmp_path)
    path.write_text(path.read_text()[:-20])
    started.clear()
    assert run(tmp_path) == 0
    assert results(tmp_path) == before
    # The run's own directory still says how it ended.
    assert not started


@pytest.mark.parametrize("kept", [0, 1])
def test_a_line_that_was_cut_off_costs_no_other_result(started, tmp_path, kept):
    assert run(tmp_path) == 0
    path = tmp_path / "out/results.jsonl"
    whole = results(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:kept]) + lines[kept][:8])
    assert run(tmp_path) == 0
    assert run(tmp_path) == 0
    assert results(tmp_path) == whole


def test_a_broken_line_before_others_is_named_and_nothing_is_written(
    started, tmp_path, capsys
):
    assert run(tmp_path) == 0
    path = tmp_path / "out/results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:8] + "\n" + "".join(lines[2:]))
    before = path.read_text()
    capsys.readouterr()
    started.clear()
    assert run(tmp_path) == 2
    assert "results.jsonl, line 2 is no record" in one_error_line(capsys)
    assert path.read_text() == before
    assert not started


def test_rates_of_other_settings_are_not_taken(started, tmp_path):
    source, other = tmp_path / "source", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    assert run(source) == 0
    path = source / "out/results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # As good as can be, with an option that the method has no longer.
    stale = [
        {**line, "learning_rate": 1.0, "validation_loss": 0.0, "flags": {"rank": 3}}
        for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + stale))
    started.clear()
    flags = ["--rates-from", str(source / "out"), "--data", "other"]
    assert run(other, *flags) == 0
    assert {float(call["--learning-rate"]) for call in started} == {0.008}


def test_rates_of_a_comparison_with_an_unknown_flag_are_a_mistake(
    started, tmp_path, capsys
):
    source, other = tmp_path / "source", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    assert run(source) == 0
    path = source / "out/suite.json"
    definition = json.loads(path.read_text())
    definition["flags"]["stepz"] = 3
    path.write_text(json.dumps(definition))
    started.clear()
    capsys.readouterr()
    flags = ["--rates-from", str(source / "out"), "--data", "other"]
    assert run(other, *flags) == 2
    assert "--stepz is not a flag of this command; did you mean --steps?" in (
        capsys.readouterr().err
    )
    assert not started


def test_a_suite_takes_its_own_rates_of_a_method_that_is_like_another(
    started, tmp_path, monkeypatch
):
    like = [
        dataclasses.replace(contender, like=f"another {contender.name}")
        for contender in SUITE.contenders
    ]
    suite = dataclasses.replace(SUITE, contenders=tuple(like))
    monkeypatch.setitem(suites.SUITES, "cpu-small", suite)
    source, other = tmp_path / "source", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    assert run(source) == 0
    flags = ["--rates-from", str(source / "out"), "--data", "other"]
    assert run(other, *flags) == 0
    assert len(started) == 10 + 4


def test_a_directory_where_nothing_was_done_takes_other_data(
    started, tmp_path, monkeypatch
):
    process = Processes.run
    monkeypatch.setattr(Processes, "run", lambda self, flags, log: log.write_text("no"))
    assert run(tmp_path, "--data", "tpyo") == 2
    monkeypatch.setattr(Processes, "run", process)
    assert run(tmp_path, "--data", "typo") == 0
    assert {call["--data"] for call in started} == {"typo"}


def test_a_directory_at_work_is_refused(started, tmp_path, capsys):
    del started
    pytest.importorskip("fcntl", reason="needs locks of files")
    assert run(tmp_path, "--only", "adamw") == 0
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(tmp_path) == 2
    assert "is in use by another process" in one_error_line(capsys)
    assert run(tmp_path) == 0


def test_a_comparison_that_is_refused_leaves_the_runs_of_the_one_at_work(
    tmp_path,
):
    pytest.importorskip("fcntl", reason="needs locks of files")
    out = tmp_path / "out"
    definition = {"suite": "cpu-small", "flags": {"steps": 10}}
    at_work = Ledger(out, definition)
    (out / "runs/first").mkdir(parents=True)
    # Nothing of it is recorded yet.
    with pytest.raises(UserError, match="is in use by process"):
        Ledger(out, {**definition, "flags": {"steps": 11}})
    assert (out / "runs/first").is_dir()
    at_work.close()


def test_a_comparison_that_was_ended_before_its_first_file_begins_again(
    started, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text("process 1")
    (out / "suite.json.unfinished").write_text("{")
    assert run(tmp_path, "--only", "adamw") == 0
    assert started
    (out / "suite.json").write_text("{")
    assert run(tmp_path) == 2
    assert f"{out}/suite.json is broken" in one_error_line(capsys)


def test_a_full_disk_is_one_line(started, tmp_path, monkeypatch, capsys):
    del started

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "add", full)
    assert run(tmp_path) == 2
    assert "No space left on device" in one_error_line(capsys)


def test_a_lost_terminal_is_ignored_where_the_shell_says_so(started, tmp_path):
    del started
    seen = []

    class Suspicious(compare.Console):
        def print(self, *words, **options):
            seen.append(signal.getsignal(signal.SIGHUP))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Console", Suspicious)
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert run(tmp_path, "--only", "adamw") == 0
        finally:
            signal.signal(signal.SIGHUP, old)
    assert set(seen) == {signal.SIG_IGN}


def test_paths_are_printed_as_they_are(started, tmp_path, capsys):
    del started
    out = tmp_path / "x[v2][/v3]:key:"
    assert compare.main(["cpu-small", "--out", str(out), "--only", "adamw"]) == 0
    assert f"results in {out}" in capsys.readouterr().out


def test_rates_are_not_taken_from_a_method_that_has_diverged():
    record = {
        **{"method": "adamw", "learning_rate": 1.0, "block_learning_rate": 1.0},
        **{"status": "finished", "validation_loss": 2.0, "step": 9},
    }
    whole = [{**record, "seed": 0}, {**record, "seed": 1}]
    assert best_rates(whole, 2, LOSS) == {"adamw": (1.0, 1.0)}
    assert not best_rates([whole[0], {**whole[1], "status": "diverged"}], 2, LOSS)
    # What a file has for a number that is not finite.
    assert not best_rates([whole[0], {**whole[1], "validation_loss": None}], 2, LOSS)


def test_rates_of_all_tasks_are_none_of_a_suite_without_tasks(tmp_path):
    for directory in (tmp_path, tmp_path / "mrpc", tmp_path / "rte"):
        directory.mkdir(exist_ok=True)
        (directory / "suite.json").write_text("{}")
    named = f"give {tmp_path / 'mrpc'} or {tmp_path / 'rte'}"
    with pytest.raises(UserError, match=re.escape(named)):
        rates_of(tmp_path, METRIC)


def test_no_state_is_a_share_of_nothing(started, tmp_path):
    del started
    assert run(tmp_path, "--only", "adamw") == 0
    (row,) = rows_of(results(tmp_path))
    free = {**row.runs[0], "block_state_bytes": 0}
    assert dataclasses.replace(row, runs=(free,)).block_share == 0
    assert math.isnan(dataclasses.replace(row, runs=({},)).block_share)


def test_the_best_of_a_curve_passes_over_what_is_not_finite():
    assert LOSS.best([3.0, None, 2.0]) == 2.0
    assert METRIC.best([None, 0.5]) == 0.5


def test_rates_are_not_taken_from_a_search_that_has_not_ended(
    started, tmp_path, monkeypatch, capsys
):
    source = tmp_path / "source"
    source.mkdir()
    process = Processes.run

    def interrupted(self, flags, log):
        if len(started) == 3:
            raise KeyboardInterrupt
        return process(self, flags, log)

    monkeypatch.setattr(Processes, "run", interrupted)
    assert run(source) == 128 + signal.SIGINT
    monkeypatch.setattr(Processes, "run", process)
    capsys.readouterr()
    started.clear()
    flags = ["--rates-from", str(source / "out"), "--data", "other"]
    assert run(tmp_path, *flags) == 2
    assert "has no rates of 'adamw'" in one_error_line(capsys)
    assert not started


@pytest.mark.slow
def test_a_terminated_comparison_ends_its_runs_each_with_a_checkpoint(tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    flags = dict(zip(*[iter(write_inputs(inputs))] * 2, strict=True))
    script = f"""
import sys
from experiments import compare
from experiments.comparison import suites
from experiments.comparison.flags import fields_of
flags = {{"initial_weights": {flags["--initial-weights"]!r}, "steps": 5_000}}
adamw = suites.Contender("adamw", {{"optimizer": "adamw"}}, 0.125)
suite = suites.Suite("one", flags, (adamw,))
suites.SUITES["cpu-small"] = suite
out, data = {str(tmp_path / "out")!r}, {flags["--data"]!r}
sys.exit(compare.main(["cpu-small", "--out", out, "--data", data]))
"""
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not (logs := list(tmp_path.glob("out/runs/*.log"))) or (
            "step 1/" not in logs[0].read_text()
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
    assert "--resume" in logs[0].read_text()
    assert len(list(tmp_path.glob("out/runs/*/checkpoints/[0-9]*"))) == 1


def test_an_ablation_of_the_rank_has_the_capacity_as_its_floor():
    for name in ("refresh only", "neither"):
        (contender,) = (
            c for c in suites.SUITES["ablation-adaptive"].contenders if c.name == name
        )
        words = words_of(dict(contender.flags))
        config = complete(parse(words), hidden_size=128)
        assert config.min_rank == config.rank


def test_a_variant_takes_the_rates_of_its_method(
    started, tmp_path, monkeypatch, capsys
):
    variant = suites.Contender(
        "sumo r=4", {"optimizer": "sumo", "rank": 4}, 1.0, like="sumo 8 bits"
    )
    first, second = SUITE.contenders
    suite = dataclasses.replace(SUITE, contenders=(variant, first, second))
    monkeypatch.setitem(suites.SUITES, "cpu-small", suite)
    assert run(tmp_path, "--only", "sumo r=4") == 2
    assert "no rates of 'sumo 8 bits'" in one_error_line(capsys)
    assert not started
    assert run(tmp_path) == 0
    rows = {row.method: row for row in rows_of(results(tmp_path))}
    ours, method = rows["sumo r=4"], rows["sumo 8 bits"]
    assert ours.tried == len(SUITE.seeds)
    assert ours.learning_rate == method.learning_rate
    assert ours.block_learning_rate == method.block_learning_rate


def test_a_wider_model_takes_the_rates_of_the_same_share_of_the_width():
    small, wide = suites.SUITES["cpu-small"], suites.SUITES["cpu-wide"]
    of_small = {c.name: c for c in small.contenders}
    for contender in wide.contenders:
        like = of_small[contender.like or contender.name]
        flags = dict(like.flags)
        if contender.like:
            assert 128 * contender.flags["rank"] == 256 * flags.pop("rank")
            flags["rank"] = contender.flags["rank"]
        assert contender.flags == flags


def test_the_front_has_what_nothing_beats_in_bytes_and_loss():
    rows = [(0.5, 2.0), (0.1, 3.0), (0.5, 1.9), (0.2, 3.0), (1.0, 1.9), (2.0, 1.0)]
    assert front(rows, lambda row: row) == [(0.1, 3.0), (0.5, 1.9), (2.0, 1.0)]


def test_a_diverged_row_is_compared_with_nothing(started, tmp_path):
    del started
    assert run(tmp_path) == 0
    rows = rows_of(results(tmp_path))
    adamw = next(row for row in rows if row.method == "adamw")
    rows[rows.index(adamw)] = dataclasses.replace(adamw, losses=(2.0, math.inf))
    text = table(rows)
    assert text.count("\n") == 4
    assert "| diverged |" in text
    assert "%" not in text


def test_suites_name_methods_and_flags_that_exist():
    for name, suite in suites.SUITES.items():
        names = [contender.name for contender in suite.contenders]
        assert len(set(names)) == len(names), name
        parts = [suite.of_task(task) for task in suite.tasks] or [suite]
        for part, contender in itertools.product(parts, suite.contenders):
            fields = {**fields_of(contender, part), "out": "x"}
            if suite.trainer is TUNER:
                # As the command checks it; a parse takes much longer.
                config = TuningConfig(**{**fields, "train": "x"})
                TUNING.check(config, frozenset(fields))
            else:
                config = parse(words_of(fields))
            assert config.optimizer == contender.flags["optimizer"]


@pytest.mark.usefixtures("one_device")
def test_a_real_run_is_started_and_recorded(tmp_path, monkeypatch):
    flags = write_inputs(tmp_path)
    fields = to_json(parse(flags))
    names = [word[2:].replace("-", "_") for word in flags[::2] if word != "--data"]
    suite = suites.Suite(
        "one method",
        {name: fields[name] for name in names},
        (suites.Contender("adamw", {"optimizer": "adamw"}, 0.125),),
        seeds=(0,),
        search=1,
    )
    monkeypatch.setitem(suites.SUITES, "cpu-small", suite)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert run(tmp_path, "--data", fields["data"]) == 0
    (record,) = results(tmp_path)
    assert record["status"] == "finished"
    assert record["step"] == 4
    assert record["validation_loss"] < record["initial_validation_loss"]
    # The blocks' own schedule counts its updates: one int32 more.
    assert record["block_state_bytes"] == record["block_adamw_state_bytes"] + 4
    assert record["versions"]["jax"]
    assert [point[0] for point in record["validation_curve"]] == [192, 256]
