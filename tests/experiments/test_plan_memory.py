"""The command that plans memory."""

import json

import pytest

from experiments.plan_memory import main
from tests.experiments.small_runs import one_error_line


def run(*flags):
    return main([str(flag) for flag in flags])


def test_it_lists_every_optimizer_and_what_is_left(capsys):
    assert run("--model", "7b", "--memory", "24GB") == 0
    said = capsys.readouterr().out
    lines = {
        line.split("│")[1].strip(): line for line in said.splitlines() if "│" in line
    }
    assert "does not fit" in lines["adamw"]
    # 26.95 GB of two bfloat16 moments; 13.48 of parameters.
    assert "26.95" in lines["adamw"]
    assert "13.48" in lines["adamw"]
    assert "does not fit" not in lines["projfactor, 8 bits"].split("│")[-2]
    assert len(lines) >= 10


def test_one_optimizer_leaf_by_leaf_and_as_json(capsys, tmp_path):
    path = tmp_path / "plans.json"
    flags = ("--model", "60m", "--leaves-of", "galore", "--json", path)
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "['blocks']['mlp']['up']" in said
    assert "512 -> 128" in said
    plans = json.loads(path.read_text())
    total = plans["galore"]["optimizer_bytes"]
    assert total == sum(plans["galore"]["state_bytes"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "8b"], "--model '8b' is not known; choose one of tiny"),
        (["--memory", "much"], "--memory: 'much' is not a number of bytes"),
        (["--leaves-of", "sgd"], "--leaves-of 'sgd' is none of: adamw"),
        (["--rank", "0"], "--rank must be at least 1"),
        (
            ["--ranks", "3"],
            "--ranks is not a flag of this command; did you",
        ),
        (["--model", "60m", "--json", "/nowhere/plans.json"], "/nowhere/plans.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    assert run(*flags) == 2
    assert message in one_error_line(capsys)
