"""Tables of comparisons: present settings alone, and what a search has not tried."""

import json

import pytest

from benchmarks import suite_tables
from experiments.comparison.flags import resolved
from experiments.comparison.suites import SUITES

SUITE = SUITES["cpu-small"]
CONTENDERS = {contender.name: contender for contender in SUITE.contenders}


def record(method, rest, blocks, seed, loss, **changes):
    return {
        "method": method,
        "flags": resolved(CONTENDERS[method], SUITE),
        "learning_rate": rest,
        "block_learning_rate": blocks,
        "seed": seed,
        "status": "finished",
        "step": 600,
        "validation_loss": loss,
        **{"block_state_bytes": 1, "block_adamw_state_bytes": 8},
        **{"optimizer_state_bytes": 2, "adamw_state_bytes": 10},
        **changes,
    }


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Writes results of cpu-small; returns the body of the table, by method."""
    monkeypatch.setattr(suite_tables, "RESULTS", tmp_path)

    def table(*records, rates_from=None, flags=SUITE.flags):
        (tmp_path / "cpu-small").mkdir(exist_ok=True)
        definition = json.dumps({"rates_from": rates_from, "flags": flags})
        (tmp_path / "cpu-small/suite.json").write_text(definition)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "cpu-small/results.jsonl").write_text(text)
        _, *body = suite_tables.table("cpu-small")
        return {row[0].strip("`"): row[1:] for row in body}

    return table


def test_a_row_has_each_seed_and_stands_beside_adamw_and_muon(told):
    found = told(
        *(record("muon", 0.032, 0.008, seed, 1.5 + seed / 10) for seed in (0, 1)),
        record("adamw", 0.016, 0.002, 0, 2.0),
        rates_from="elsewhere",
    )
    assert list(found) == ["muon", "adamw"]
    expected = ["0.032, 0.008", "1.5000, 1.6000", "1.5500", "-22.5 %", "+0.0 %"]
    assert found["muon"] == [*expected, "0.125", "0.200", "2", ""]
    assert found["adamw"][3:5] == ["+0.0 %", "+29.0 %"]


def test_neighbours_that_a_search_has_not_tried_are_counted(told):
    tried = [(0.032, 0.008), (0.064, 0.008), (0.032, 0.004), (0.064, 0.016)]
    runs = [record("muon", *rates, 0, 1.7 + i) for i, rates in enumerate(tried)]
    assert told(*runs) == {}, "a search whose other seeds are to come has not ended"
    runs += [record("muon", *tried[0], seed, 1.7) for seed in (1, 2)]
    # Neither the halves of the first rate nor twice the second: a corner is no one.
    assert told(*runs)["muon"][-1] == "2"
    more = [record("muon", 0.016, 0.008, 0, 9.0), record("muon", 0.032, 0.016, 0, 9.0)]
    assert told(*runs, *more)["muon"][-1] == "0"


def test_runs_of_other_settings_are_not_in_the_table(told):
    found = told(
        record("muon", 0.032, 0.008, 0, 1.7),
        record("muon", 0.016, 0.008, 0, 1.0, flags={"optimizer": "muon"}),
        rates_from="elsewhere",
    )
    assert found["muon"][0] == "0.032, 0.008"


def test_results_of_other_flags_of_the_suite_are_refused(told):
    with pytest.raises(ValueError, match="other flags"):
        told(record("muon", 0.032, 0.008, 0, 1.7), flags={**SUITE.flags, "steps": 7})
