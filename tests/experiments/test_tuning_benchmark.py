"""The benchmark that runs suites of fine-tuning in one process."""

import contextlib
import json
import math
import time

import pytest

from benchmarks.tuning import tables
from benchmarks.tuning.jobs import jobs_of
from benchmarks.tuning.runs import Late, Method
from experiments.comparison.ledger import matching
from experiments.comparison.measures import METRIC
from experiments.comparison.suite import Contender, Suite
from experiments.comparison.trainers import TUNER
from tests.experiments.small_tuning import tune, write_inputs

STEPS = 8


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def made(flags, optimizer: str) -> Method:
    names = dict(zip(flags[::2], flags[1::2], strict=True))
    suite = Suite(
        "one method",
        {
            "model": names["--model"],
            "batch_size": 8,
            "steps": STEPS,
            "eval_every": 4,
            # Its numbers differ: the batches of the two have other lengths.
            "dropout": 0.0,
        },
        (),
        trainer=TUNER,
        measure=METRIC,
    )
    contender = Contender(optimizer, {"optimizer": optimizer, "rank": 4}, 4.0, 1e-4)
    data = {"train": names["--train"], "validation": names["--validation"]}
    deadline = time.monotonic() + 1_000
    return Method(suite, contender, data, deadline, contextlib.nullcontext())


@pytest.fixture(scope="module")
def method(flags):
    return made(flags, "adarankgrad")


def assert_as_the_command(method, flags, directory, optimizer, seed, rates):
    found = method.run(rates, seed)

    rest, blocks = rates
    changed = ["--learning-rate", rest, "--block-scale", blocks / rest]
    changed += ["--dropout", 0.0, "--seed", seed, "--out", directory / "run"]
    changed += ["--optimizer", optimizer, "--rank", 4, "--eval-every", 4]
    assert tune(*flags, *changed) == 0
    wanted = json.loads((directory / "run" / "summary.json").read_text())
    # Padding changes the order of sums in float32, and Adam divides by the square root
    # of small numbers: the losses of the two agreed to 2e-6.
    assert math.isclose(
        found["validation_loss"], wanted["validation_loss"], rel_tol=1e-4
    )
    names = ("last_metrics", "tokens", "epoch", "effective_rank_by_layer")
    bytes_of = ("block_state", "block_adamw_state", "optimizer_state", "adamw_state")
    for name in (*names, *(f"{x}_bytes" for x in bytes_of)):
        assert found[name] == wanted[name], name


@pytest.mark.slow
def test_runs_are_those_of_the_command(method, flags, tmp_path):
    # One program for all seeds and rates: another run has been before this one.
    method.run((1e-3, 1e-3), 0)
    assert_as_the_command(method, flags, tmp_path, "adarankgrad", 1, (3e-3, 6e-3))


@pytest.mark.slow
def test_runs_with_adapters_are_those_of_the_command(flags, tmp_path):
    method = made(flags, "lora")
    assert_as_the_command(method, flags, tmp_path, "lora", 1, (1e-3, 2e-3))


@pytest.mark.slow
def test_a_diverged_run_has_no_results(method):
    found = method.run((1e30, 1e30), 0)
    assert found["status"] == "diverged"
    assert "validation_loss" not in found


def test_the_end_of_the_time_ends_a_run(method, monkeypatch):
    monkeypatch.setattr(method, "_deadline", time.monotonic())
    with pytest.raises(Late):
        method.run((1e-3, 1e-3), 0)


def test_known_runs_are_found_by_all_of_their_settings(method):
    record = {**method.key((1e-3, 1e-3), 0), "status": "finished"}
    assert matching([record], method.key((1e-3, 1e-3), 0)) is record
    assert matching([record], method.key((1e-3, 2e-3), 0)) is None
    assert matching([record], method.key((1e-3, 1e-3), 1)) is None


class _Options:
    suites, parts, only = ["glue-small"], ["rte", "mrpc"], ["galore r=8", "adamw"]


def test_jobs_come_by_importance():
    jobs = [(job.method, job.part) for job in jobs_of(_Options())]  # pyright: ignore
    assert jobs == [
        ("galore r=8", "mrpc"),
        ("galore r=8", "rte"),
        ("adamw", "mrpc"),
        ("adamw", "rte"),
    ]


def _record(part, method, metric, seed):
    return {
        **{"suite": "glue-small", "part": part, "method": method, "flags": {}},
        **{"learning_rate": 1e-4, "block_learning_rate": 1e-4, "seed": seed},
        **{"status": "finished", "step": 300, "steps": 300, "task": part},
        **{"model": "minilm", "metric": "f1", "last_metric": metric},
        **{"last_metrics": {"f1": metric}, "validation_loss": 0.5, "data": "rows"},
        **{"device": "one", "commit": "abc", "validation_curve": [(1, 1.0, metric)]},
        **{"block_state_bytes": 2e6, "optimizer_state_bytes": 3e6, "mean_ranks": {}},
        **{"effective_rank": None, "step_seconds": 0.5, "step_peak_bytes": 4e6},
    }


def test_tables_join_the_tasks():
    records = [
        *(_record("mrpc", "adamw", x, i) for i, x in enumerate((0.8, 0.9))),
        _record("rte", "adamw", 0.5, 0),
    ]
    lines = tables.text(records).splitlines()
    assert "| adamw | 0.8500 ± 0.0707 | 0.5000 |" in lines
    assert "| adamw | 2 | 1 |" in lines
