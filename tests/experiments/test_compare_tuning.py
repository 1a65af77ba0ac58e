"""Comparisons of fine-tuning runs: their tasks, joined tables, and what they refuse."""

import dataclasses
import json
import math
import random
import signal
import statistics
from pathlib import Path

import pytest

from experiments import compare
from experiments.comparison import suites
from experiments.comparison.examples import find_examples
from experiments.comparison.measures import LOSS, METRIC
from experiments.comparison.processes import Processes
from experiments.comparison.suite import Contender, Suite, Task
from experiments.comparison.trainers import TUNER
from experiments.errors import UserError
from experiments.optim.tuning import TUNING
from tests.experiments.small_runs import one_error_line
from tests.experiments.small_tasks import write_rows
from tests.experiments.small_tuning import write_inputs

SUITE = Suite(
    "two methods",
    {"steps": 10, "batch_size": 16},
    (
        Contender("adamw", {"optimizer": "adamw"}, 1.0, 1e-4),
        Contender("galore r=4", {"optimizer": "galore", "rank": 4}, 4.0, 1e-4),
        Contender(
            "frozen",
            {"optimizer": "adamw", "frozen": "blocks"},
            1.0,
            1e-3,
            trains_blocks=False,
        ),
    ),
    seeds=(0, 1, 2),
    search=4,
    trainer=TUNER,
    measure=METRIC,
    data=None,
    tasks=(
        Task("cola", {"task": "cola", "batch_size": 32}),
        Task("rte", {"task": "rte"}, 2e-4),
    ),
)
NAMES = {"cola": "matthews", "rte": "accuracy"}


@pytest.fixture
def started(monkeypatch, tmp_path_factory):
    """Runs of the suite are functions; returns the list of those that were started."""
    # Not the packaged model, which may not be installed.
    model = str(write_model(tmp_path_factory.mktemp("model")))
    suite = dataclasses.replace(SUITE, flags={**SUITE.flags, "model": model})
    monkeypatch.setitem(suites.SUITES, "glue-small", suite)
    calls = []

    def process(self, flags, log):
        del log
        arguments = dict(zip(flags[::2], flags[1::2], strict=False))
        calls.append({"program": self._program, **arguments})
        return write_run(arguments)

    monkeypatch.setattr(Processes, "run", process)
    return calls


def write_model(directory):
    """Writes what says that it is an encoder; returns the directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return directory


def write_run(arguments):
    """Writes what a run leaves behind; its metric is a hill of the rates."""
    directory = Path(arguments["--out"])
    directory.mkdir()
    rest = float(arguments["--learning-rate"])
    blocks = rest * float(arguments["--block-scale"])
    seed = int(arguments["--seed"])
    metric = 0.8 - 0.1 * abs(math.log2(blocks / 4e-4)) + 0.01 * seed
    if "--frozen" in arguments:
        metric = 0.5 - 0.1 * abs(math.log2(rest / 4e-3)) + 0.01 * seed
    lines = [
        {"step": 0, "tokens": 0, "validation_metric": 0.95},
        {"step": 5, "tokens": 50, "validation_metric": metric + 0.1},
        {"step": 10, "tokens": 99, "validation_metric": metric, "ranks": {"a": [3]}},
    ]
    lines[1]["validation_loss"], lines[2]["validation_loss"] = 0.5, 0.7
    lines = [{"tokens_per_second": 10.0, **line} for line in lines]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    steps = int(arguments["--steps"])
    (directory / "config.json").write_text(json.dumps({"steps": steps}))
    name = NAMES[arguments["--task"]]
    summary = {
        # Worse than at first, and finished: a metric may fall.
        **{"task": arguments["--task"], "model": "minilm", "steps": steps},
        **{"metric": name, "last_metric": metric, "initial_metric": 0.95},
        **{"last_metrics": {name: metric, "other_metric": 0.25}},
        **{"validation_loss": 0.7, "tokens_per_second": 10.0, "step_seconds": 0.5},
        **{"optimizer_state_bytes": 5e6, "adamw_state_bytes": 2e7},
        **{"block_state_bytes": 1e6 * (1 + seed), "block_adamw_state_bytes": 8e6},
        **{"mean_ranks": {"a": [2.0, 4.0], "b": 6.0}, "effective_rank": 3.5},
        **{"step_peak_bytes": 7e6, "data": "rows\nof text", "device": "cpu"},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return 0


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "glue"
    directory.mkdir()
    for task in NAMES:
        for part in ("train", "validation"):
            (directory / f"{task}_{part}.jsonl.gz").touch()
    return directory


def run(tmp_path, data, *flags):
    out = tmp_path / "out"
    words = ["--out", out, "--data", data, *flags]
    return compare.main(["glue-small", *map(str, words)])


def cells(text, title, method):
    """Returns the cells of a method in the table under a title."""
    lines = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    line = next(x for x in lines if x.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_each_task_is_searched_alone_and_the_tables_are_joined(started, tmp_path, data):
    assert run(tmp_path, data) == 0
    assert {call["program"] for call in started} == {"experiments.finetune"}
    first = started[0]
    assert first["--train"] == str(data / "cola_train.jsonl.gz")
    assert first["--validation"] == str(data / "cola_validation.jsonl.gz")
    assert first["--batch-size"] == "32"
    text = (tmp_path / "out/table.md").read_text()
    assert "| method | cola, matthews | rte, accuracy |" in text
    deviation = statistics.stdev([0.8, 0.81, 0.82])
    # From 1e-4 two doublings of the blocks' rate lead to 4e-4.
    best = f"{0.81:.4f} ± {deviation:.4f}"
    assert cells(text, "Last validation", "adamw")[0] == best
    assert cells(text, "Last validation", "galore r=4")[0] == best
    # Not the one before the first step.
    assert cells(text, "Best validation", "adamw")[0].startswith("0.9100 ±")
    assert cells(text, "Block state", "adamw") == ["2.000", "2.000"]
    assert cells(text, "Whole state", "adamw") == ["5.000", "5.000"]
    assert cells(text, "Rank", "galore r=4") == ["4.50", "4.50"]
    assert cells(text, "Effective rank", "galore r=4") == ["3.50", "3.50"]
    assert cells(text, "Seconds per step", "adamw") == ["0.500", "0.500"]
    assert cells(text, "Peak", "adamw") == ["7", "7"]
    assert cells(text, "Seeds", "frozen") == ["3", "3"]
    for task, name in NAMES.items():
        figures = {path.name for path in (tmp_path / "out" / task).glob("*.svg")}
        assert figures == {f"metric-{x}.svg" for x in ("tokens", "time", "bytes")} | {
            "ranks.svg"
        }
        axes = (tmp_path / "out" / task / "metric-bytes.svg").read_text()
        assert f"validation {name}" in axes
        assert "other metric" in (tmp_path / "out" / task / "table.md").read_text()
    count = len(started)
    assert run(tmp_path, data) == 0
    assert len(started) == count


def test_a_task_has_its_own_rate_and_no_method_more_runs_than_another(
    started, tmp_path, data
):
    assert run(tmp_path, data, "--tasks", "rte") == 0
    searches = {}
    for call in started:
        if call["--seed"] == "0":
            method = call.get("--frozen") or call["--optimizer"]
            searches.setdefault(method, []).append(call)
    assert all(len(calls) <= SUITE.search for calls in searches.values())
    assert {float(calls[0]["--learning-rate"]) for calls in searches.values()} == {2e-4}
    # The blocks' rate has no effect: the other one is doubled to 1.6e-3.
    assert [
        (float(call["--learning-rate"]), float(call["--block-scale"]))
        for call in searches["blocks"]
    ] == [(2e-4 * 2**i, pytest.approx(2.0**-i)) for i in range(4)]
    text = (tmp_path / "out/table.md").read_text()
    assert "cola" not in text
    assert run(tmp_path, data, "--tasks", "cola", "--only", "adamw") == 0
    text = (tmp_path / "out/table.md").read_text()
    assert cells(text, "Seeds", "adamw") == ["3", "3"]
    assert cells(text, "Seeds", "frozen") == ["", "3"]


def test_an_interrupted_comparison_of_tasks_goes_on_alike(
    started, tmp_path, data, monkeypatch
):
    whole = tmp_path / "whole"
    assert run(whole, data) == 0
    count = len(started)
    started.clear()
    process = Processes.run

    def interrupted(self, flags, log):
        # In the second task.
        if len(started) == count - 2:
            raise KeyboardInterrupt
        return process(self, flags, log)

    monkeypatch.setattr(Processes, "run", interrupted)
    assert run(tmp_path, data) == 128 + signal.SIGINT
    assert (tmp_path / "out/table.md").exists()
    monkeypatch.setattr(Processes, "run", process)
    assert run(tmp_path, data, "--jobs", "2") == 0
    assert len(started) == count
    tables = [(x / "out/table.md").read_text() for x in (tmp_path, whole)]
    assert tables[0] == tables[1]


def test_rates_are_taken_from_the_same_task(started, tmp_path, data):
    assert run(tmp_path, data) == 0
    first = {call["--task"]: call for call in started if "--frozen" in call}
    started.clear()
    (tmp_path / "other").mkdir()
    source = ["--rates-from", tmp_path / "out"]
    assert run(tmp_path / "other", data, *source, "--only", "frozen") == 0
    assert len(started) == 2 * len(SUITE.seeds)
    for call in started:
        assert call["--learning-rate"] == first[call["--task"]]["--learning-rate"]


def test_steps_are_part_of_what_a_comparison_is(started, tmp_path, data, capsys):
    assert run(tmp_path, data, "--steps", 3, "--only", "adamw", "--tasks", "rte") == 0
    assert {call["--steps"] for call in started} == {"3"}
    saved = json.loads((tmp_path / "out/rte/suite.json").read_text())
    assert saved["flags"]["steps"] == 3
    assert "3 steps" in (tmp_path / "out/rte/table.md").read_text()
    count = len(started)
    capsys.readouterr()
    # For another task too: the joined table has runs of one length.
    assert run(tmp_path, data, "--tasks", "cola") == 2
    assert "holds another comparison" in one_error_line(capsys)
    assert len(started) == count


def test_a_task_that_was_begun_keeps_the_comparison_as_it_is(
    started, tmp_path, data, capsys
):
    assert run(tmp_path, data, "--only", "adamw", "--tasks", "rte") == 0
    (tmp_path / "out/rte/results.jsonl").unlink()
    (tmp_path / "out/rte/runs/begun/checkpoints/5").mkdir(parents=True)
    capsys.readouterr()
    assert run(tmp_path, data, "--steps", 3) == 2
    assert "holds another comparison: flags was" in one_error_line(capsys)


def test_rates_of_tasks_serve_no_other_task(started, tmp_path, data, capsys):
    assert run(tmp_path, data, "--tasks", "rte") == 0
    started.clear()
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    assert run(tmp_path / "other", data, "--rates-from", tmp_path / "out") == 2
    line = one_error_line(capsys)
    assert f"--rates-from {tmp_path / 'out/cola'} holds no comparison" in line
    assert not started
    assert not (tmp_path / "other/out").exists()


def test_a_compared_loss_has_the_metrics_beside_it(started, tmp_path, data):
    suite = suites.SUITES["glue-small"]
    suites.SUITES["glue-small"] = dataclasses.replace(suite, measure=LOSS)
    assert run(tmp_path, data, "--tasks", "rte") == 0
    lines = (tmp_path / "out/rte/table.md").read_text().splitlines()
    heads = next(line for line in lines if line.startswith("| method |"))
    assert heads.startswith(
        "| method | rates: rest, blocks | loss, last | loss, best | seeds "
        "| accuracy | other metric | block state |"
    )
    cells = next(line for line in lines if line.startswith("| adamw |")).split(" | ")
    # Losses are equal, and the first one is the least: its search goes nowhere.
    assert cells[2:7] == ["0.7000 ± 0.0000", "0.5000 ± 0.0000", "3", "0.7100", "0.2500"]
    assert "| method | rte, loss |" in (tmp_path / "out/table.md").read_text()


def test_a_comparison_whose_runs_diverge_has_a_table(
    started, tmp_path, data, monkeypatch
):
    def diverged(self, flags, log):
        directory = Path(dict(zip(flags[::2], flags[1::2], strict=False))["--out"])
        directory.mkdir()
        (directory / "config.json").write_text('{"steps": 10}')
        line = {"step": 3, "tokens": 9, "tokens_per_second": 1.0, "loss": 2.0}
        (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        log.write_text("the loss is not finite")
        return 1

    del started
    monkeypatch.setattr(Processes, "run", diverged)
    assert run(tmp_path, data, "--tasks", "rte", "--only", "adamw") == 0
    text = (tmp_path / "out/rte/table.md").read_text()
    assert "two methods: every run diverged; of commit" in text
    assert "| adamw | 0.0002, 0.0002 | diverged | diverged | 3 |" in text
    assert "0.0002, 0.0002 after step 3" in text
    assert "None" not in text
    assert "| adamw | diverged |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["glue-small", "--tasks", "colla"], "did you mean cola?"),
        (["glue-granularity", "--tasks", "mrpc"], "--tasks has no effect"),
        (["cpu-small", "--tasks", "cola"], "--tasks has no effect"),
        (["glue-small", "--validation-data", "x"], "--validation-data has no effect"),
        (["glue-small", "--tokenizer", "x"], "--tokenizer has no effect"),
        (["glue-small", "--steps", "0"], "--steps must be at least 1"),
        (["glue-small", "--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["glue-small", "--only", "galor r=8"], "did you mean galore r=8?"),
        (
            ["glue-small", "--data", ".", "--model", "bert"],
            "has no cola_train.jsonl (nor .csv",
        ),
        (["glue-small", "--data", "x.jsonl"], "x.jsonl is no directory; glue-small"),
        (
            ["glue-granularity", "--data", "x.jsonl", "--model", "bert"],
            "no file matches 'x.jsonl'",
        ),
        (["glue-small", "--model", "nowhere"], "nowhere is no model"),
        (["glue-small", "--model", "a.gguf"], "--task cola needs an encoder"),
        (["smollm2-gsm8k", "--model", "bert"], "--task gsm8k needs a LLaMA"),
        (
            ["glue-small", "--model", "bert", "--rates-from", "runs"],
            "--rates-from runs holds no comparison",
        ),
        (["cpu-small", "--model", "minilm"], "--model has no effect"),
        (["roberta-glue"], "roberta-glue needs --model"),
        (["geneformer-like", "--model", "m"], "tokens_train.jsonl and tokens_valid"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "bert")
    (tmp_path / "a.gguf").touch()
    assert compare.main(flags) == 2
    assert message in one_error_line(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "bert"}


def test_rates_of_another_measure_are_refused(started, tmp_path, data, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "suite.json").write_text('{"seeds": [0]}')
    record = {"method": "adamw", "seed": 0, "status": "finished", "validation_loss": 1}
    (source / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert run(tmp_path, data, "--rates-from", source) == 2
    assert "has runs without last_metric" in one_error_line(capsys)
    assert not started


def test_examples_are_found_by_the_name_of_the_task(tmp_path):
    for name in (
        *("mnli_train.jsonl.gz", "mnli_validation_matched.jsonl.gz"),
        *("mnli_validation_mismatched.jsonl.gz", "train.jsonl", "test.jsonl"),
    ):
        (tmp_path / name).touch()
    train, validation = find_examples("mnli", str(tmp_path), None)
    assert train == str(tmp_path / "mnli_train.jsonl.gz")
    assert validation is not None
    assert [Path(name).name for name in validation.split(",")] == [
        "mnli_validation_matched.jsonl.gz",
        "mnli_validation_mismatched.jsonl.gz",
    ]
    assert find_examples("gsm8k", str(tmp_path), None) == (
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "test.jsonl"),
    )
    (tmp_path / "validation.csv").touch()
    found = find_examples("gsm8k", str(tmp_path), None)[1]
    assert found == str(tmp_path / "validation.csv")
    for name in (str(tmp_path / "train.jsonl"), "hub:a/b:c"):
        assert find_examples("gsm8k", name, name) == (name, name)
        with pytest.raises(UserError, match=r"no file matches 'b\.jsonl'"):
            find_examples("gsm8k", name, "b.jsonl")
    (tmp_path / "train.csv").touch()
    with pytest.raises(UserError, match=r"has train\.csv, train\.jsonl; leave one"):
        find_examples("gsm8k", str(tmp_path), None)


def test_searches_start_at_the_defaults_of_fine_tuning():
    suite = suites.SUITES["glue-small"]
    for contender in suite.contenders:
        scale = TUNING[contender.flags["optimizer"]]["block_scale"]
        assert contender.block_scale == scale
    epochs = suites.SUITES["roberta-glue"].changed(steps=7, model="m").flags
    assert epochs["steps"] == 7
    assert "epochs" not in epochs


def test_a_granularity_keeps_the_budget():
    for name in ("glue-granularity", "smollm2-gsm8k"):
        budgets = {
            contender.flags["granularity"] * contender.flags["rank"]
            for contender in suites.SUITES[name].contenders
            if "granularity" in contender.flags
        }
        assert budgets == {32}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_sequences_of_integers_are_learned_by_a_real_comparison(tmp_path, monkeypatch):
    """The label is whether id 4 comes before id 29."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    model = write_inputs(inputs)[1]
    draw = random.Random(0)

    def row():
        ids = [draw.randrange(5, 29) for _ in range(5)]
        first, second = sorted(draw.sample(range(6), 2))
        label = draw.randrange(2)
        for place, one in zip((first, second), (4, 29)[:: 1 - 2 * label], strict=True):
            ids.insert(place, one)
        return {"input_ids": ids, "label": label}

    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "tokens_train.jsonl", [row() for _ in range(640)])
    write_rows(data / "tokens_validation.jsonl", [row() for _ in range(128)])
    flags = {**suites.SUITES["geneformer-like"].flags, "gradients": "full"}
    suite = Suite(
        "integers",
        {**flags, "dropout": 0.0, "batch_size": 32, "eval_every": 1_000},
        (Contender("adamw", {"optimizer": "adamw"}, 1.0, 1e-2),),
        seeds=(0,),
        search=1,
        trainer=TUNER,
        measure=METRIC,
        data=None,
    )
    monkeypatch.setitem(suites.SUITES, "geneformer-like", suite)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    out = tmp_path / "out"
    words = ["--model", model, "--data", data, "--steps", 120, "--out", out]
    assert compare.main(["geneformer-like", *map(str, words)]) == 0
    (line,) = (out / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["metric"] == "accuracy"
    # A guess is right in half of them.
    assert record["last_metric"] > 0.9
    assert set(record["last_metrics"]) == {"accuracy", "macro_f1"}
    assert "macro f1" in (out / "table.md").read_text()
