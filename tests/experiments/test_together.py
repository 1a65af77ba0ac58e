"""The benchmark that pre-trains many runs of a method in one program."""

import argparse
import contextlib
import itertools
import json
import math
import time

import pytest

from benchmarks.together.jobs import Job, jobs_of, searched
from benchmarks.together.runs import Late, Run, Together
from benchmarks.together.search import is_inside, next_points
from benchmarks.together.texts import load, recorded
from experiments.comparison.search import best_point
from experiments.comparison.suite import Contender, Suite
from experiments.model.shape import MODELS
from experiments.pretrain_llama import main
from experiments.run.files import read_lines

FLAGS = {
    "model": "tiny",
    "steps": 6,
    "batch_size": 8,
    "sequence_length": 8,
    "eval_every": 3,
    "eval_tokens": 40,
    "sample_tokens": 0,
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
}
METHOD = {
    "optimizer": "adarankgrad",
    "rank": 6,
    "threshold": 0.1,
    "min_rank": 2,
    "min_refresh_interval": 2,
    "max_refresh_interval": 3,
}
SUITE = Suite("one method", FLAGS, ())
RUNS = [Run((1e-3, 2e-3), 0), Run((4e-3, 1e-3), 1), Run((1e30, 1e30), 0)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Ends of epochs are among the batches: a window is padded."""
    monkeypatch.setitem(MODELS, "tiny", SMALL)
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").write_text(f"a low rank of a {name} gradient " * 9)
    spec = ",".join(str(tmp_path / f"{x}.txt") for x in ("train", "held_out"))
    found = recorded(SUITE, {"text": spec}, 2, FLAGS["steps"])
    found.save(tmp_path / "texts.npz")
    return load(tmp_path / "texts.npz")


def made(texts, deadline=math.inf) -> Together:
    method = Contender("adarankgrad", METHOD, 0.5)
    return Together(SUITE, method, texts, 3, deadline, contextlib.nullcontext())


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_runs_side_by_side_are_those_of_the_command(texts, tmp_path):
    method = made(texts)
    found = method.train(RUNS)

    rest, blocks = RUNS[1].rates
    flags = {
        **FLAGS,
        **METHOD,
        "data": tmp_path / "train.txt",
        "validation_data": tmp_path / "held_out.txt",
        "learning_rate": rest,
        "block_scale": blocks / rest,
        "seed": 1,
        "out": tmp_path / "run",
    }
    words = ((f"--{name.replace('_', '-')}", str(x)) for name, x in flags.items())
    assert main(list(itertools.chain(*words))) == 0
    wanted = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("validation_loss", "initial_validation_loss"):
        # Sums of batched products have another order in float32: they agreed to 2e-7.
        assert math.isclose(found[1][name], wanted[name], rel_tol=1e-5), name
    for name in ("block_state", "block_adamw_state", "optimizer_state", "adamw_state"):
        assert found[1][f"{name}_bytes"] == wanted[f"{name}_bytes"], name
    assert found[1]["tokens"] == wanted["tokens"]
    # A run that runs away leaves the others alone.
    assert [x["status"] for x in found] == ["finished", "finished", "diverged"]
    assert method.key(RUNS[1])["seed"] == 1

    method._deadline = time.monotonic()
    with pytest.raises(Late):
        method.train(RUNS[:1])


def test_more_steps_than_are_written_down_are_refused(texts):
    suite = SUITE.changed(steps=12)
    with pytest.raises(ValueError, match="12 steps, and 6 are written down"):
        Together(
            suite,
            Contender("adamw", {"optimizer": "adamw"}, 1.0),
            texts,
            1,
            0.0,
            contextlib.nullcontext(),
        )


@pytest.mark.parametrize("best", [(0, 0), (1, 0), (-3, 2), (2, -2)])
def test_a_search_ends_inside_the_neighbours_of_its_best_point(best):
    losses = {}
    while points := next_points(losses, 9):
        assert len(points) <= 9
        assert not set(points) & losses.keys()
        losses |= {point: math.dist(point, best) for point in points}
    assert best_point(losses) == best
    assert is_inside(losses)
    # 9 of the first round, and at most 5 for each step from there.
    assert len(losses) <= 9 + 5 * max(map(abs, best))


def test_the_first_round_has_the_start_and_its_neighbours_first():
    cross = {(0, 1), (0, -1), (1, 0), (-1, 0)}
    first = next_points({}, 5)
    assert first[0] == (0, 0)
    assert set(first[1:]) == cross
    assert len(next_points({}, 9)) == 9


class Fake:
    """In the place of Together: a loss with its least value at known rates."""

    def __init__(self, suite, contender, texts, width, deadline, turn):
        self.width = width

    def key(self, run):
        return {"rates": list(run.rates), "stream": run.stream}

    def train(self, runs):
        assert len(runs) <= self.width
        rest, blocks = zip(*(run.rates for run in runs), strict=True)
        return [
            {
                "status": "finished",
                "validation_loss": abs(math.log2(x / 32e-3)) + abs(math.log2(y / 4e-3)),
            }
            for x, y in zip(rest, blocks, strict=True)
        ]


@pytest.fixture
def options(texts, tmp_path, monkeypatch):
    del texts
    monkeypatch.setattr("benchmarks.together.runs.Together", Fake)
    return argparse.Namespace(
        suites=["cpu-small"],
        texts=[tmp_path / "texts.npz"],
        only=None,
        out=tmp_path / "found.jsonl",
        known=[],
        candidates=None,
        width=4,
        steps=None,
        deadline=math.inf,
        commit="abc",
    )


def test_a_search_is_recorded_and_goes_on_from_what_is_known(options):
    said = searched(options, Job("cpu-small", "muon"))
    assert "0.0000 at 0.032, 0.004, inside of" in said
    records = read_lines(options.out)
    # All points of the first stream, then the best one of the other seed.
    *points, last = records
    assert {record["stream"] for record in points} == {0}
    assert (last["stream"], last["rates"]) == (1, [0.032, 0.004])
    assert len({tuple(record["rates"]) for record in points}) == len(points)

    options.known = [options.out]
    assert searched(options, Job("cpu-small", "muon")) == said
    assert read_lines(options.out) == records


def test_candidates_are_searched_beside_the_suite(options, tmp_path):
    flags = {"optimizer": "muon", "momentum": 0.9}
    more = [{"name": "less momentum", "flags": flags, "block_scale": 0.25}]
    options.candidates = tmp_path / "more.json"
    options.candidates.write_text(json.dumps(more))
    options.only = ["less momentum", "adamw"]
    jobs = jobs_of(options)
    assert [job.method for job in jobs] == options.only
    assert "inside" in searched(options, jobs[0])

    options.only = ["adamww"]
    with pytest.raises(ValueError, match="'adamww' is no method of cpu-small"):
        jobs_of(options)
