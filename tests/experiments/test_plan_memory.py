"""The command that plans memory."""

import json

import jax
import pytest

from experiments.distribution.rules import bytes_per_device
from experiments.optim.methods import BUDGETED
from experiments.plan_memory import main
from experiments.run.assemble import assemble
from experiments.run.config import check, parse
from experiments.run.plans import every_optimizer
from experiments.run.settings import to_json
from tests.experiments.small_runs import one_error_line, write_inputs


def run(*flags):
    return main([str(flag) for flag in flags])


def rows(said):
    lines = (line.split("│") for line in said.splitlines() if "│" in line)
    return {name.strip(): [x.strip() for x in cells] for _, name, *cells, _ in lines}


def test_it_lists_every_optimizer_and_what_is_left(capsys):
    flags = ("--model", "7b", "--param-dtype", "bfloat16", "--memory", "24GB")
    assert run(*flags) == 0
    said = capsys.readouterr().out
    found = rows(said)
    # 26.95 GB of two bfloat16 moments; 13.48 of parameters.
    assert found["adamw"][:3] == ["13.48", "13.48", "26.95"]
    assert found["adamw"][4:] == ["does not fit", ""]
    # Coordinates of all blocks at rank 1024, in float32: 32 layers of 4 x 4096 + 3 x
    # 11008 rows. Embedding and head are at full size, in bfloat16.
    inside = (32 * (4 * 4096 + 3 * 11_008) * 1024 * 4 + 2 * 32_000 * 4096 * 2) / 1e9
    left = 24 - 13.48 - float(found["sumo, 8 bits"][2]) - inside
    assert float(found["sumo, 8 bits"][5]) == pytest.approx(left, abs=0.02)
    assert found["galore, 8 bits"][5] == "does not fit"
    # These look at full gradients: no step of theirs holds less.
    for name in ("low_rank_muon, 8 bits", "fira, 8 bits", "scale", "muon", "adafactor"):
        assert found[name][5] == ""
    # What an adapter leaves as it is has no gradient; embedding, head and norms have.
    assert found["lora"][0] == found["relora"][0] == "23.71"
    assert float(found["lora"][1]) < 24 - 12.9
    assert {"low_rank_muon", "low_rank_muon, 8 bits", "lora"} <= found.keys()
    assert {"stable_spam", "frugal, 8 bits", "scale", "foam, 8 bits"} <= found.keys()
    assert "scale, 8 bits" not in found
    # The default rank of adarankgrad is larger than that of galore.
    assert float(found["adarankgrad"][2]) > float(found["galore"][2])
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in said


def test_flags_count_in_each_row_that_has_them():
    found = every_optimizer(parse(["--rank", "8", "--weight-decay", "0.1"]))
    for name in ("galore", "vlorp", "lora, 8 bits", "optax_galore"):
        assert (found[name].rank, found[name].weight_decay) == (8, 0.1)
    assert (found["muon"].rank, found["muon"].weight_decay) == (None, 0.1)
    assert found["sumo, 8 bits"].basis_bits == 8
    assert found["vlorp, 8 bits"].basis_bits is None
    assert "optax_galore, 8 bits" not in found
    for row in found.values():
        check(row)
    bits = every_optimizer(parse(["--moment-bits", "8"]))
    assert (bits["galore"].moment_bits, bits["adafactor"].moment_bits) == (8, None)
    assert "galore, 8 bits" not in bits
    budgeted = every_optimizer(parse(["--block-state-bytes", "1GB"]))
    assert {row.optimizer for row in budgeted.values()} == set(BUDGETED)
    assert {"adarankgrad", "low_rank_muon", "sumo"} < set(BUDGETED)
    assert not {"adamw", "vlorp", "lora", "optax_galore"} & set(BUDGETED)


RUNS = {
    "defaults": [],
    "low_rank_muon": [
        *("--optimizer", "low_rank_muon", "--basis-bits", 4, "--moment-bits", 8),
        *("--vocabulary-optimizer", "low_bit"),
    ],
    "accumulated": ["--optimizer", "galore", "--rank", 3, "--accumulate", 2],
    "bytes": ["--block-state-bytes", "12kB"],
    "lora": ["--optimizer", "lora", "--rank", 2],
}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_what_the_run_keeps(name, tmp_path, capsys):
    words = [*write_inputs(tmp_path), *map(str, RUNS[name])]
    parts = assemble(parse(words), lambda text: None)
    params, state = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in parts.abstract_state()
    )
    (tmp_path / "config.json").write_text(json.dumps(to_json(parts.config)))
    json_file = tmp_path / "plans.json"
    assert run("--config", tmp_path / "config.json", "--json", json_file) == 0
    assert list(rows(capsys.readouterr().out)) == ["adamw", "this run"]
    plan = json.loads(json_file.read_text())["this run"]
    assert (plan["parameter_bytes"], plan["optimizer_bytes"]) == (params, state)


@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_on_a_mesh_the_plan_is_what_one_device_of_the_run_keeps(
    optimizer, tmp_path, capsys
):
    flags = ["--optimizer", optimizer, "--mesh", "fsdp=2,tensor=2"]
    parts = assemble(parse([*write_inputs(tmp_path), *flags]), lambda text: None)
    (tmp_path / "config.json").write_text(json.dumps(to_json(parts.config)))
    json_file = tmp_path / "plans.json"
    assert run("--config", tmp_path / "config.json", "--json", json_file) == 0
    plan = json.loads(json_file.read_text())["this run"]
    of_device = plan["per_device"]
    kept = [bytes_per_device(tree) for tree in parts.abstract_state()]
    assert [of_device["parameters"], sum(of_device["state"].values())] == kept
    assert of_device["parameters"] < 0.6 * plan["parameter_bytes"]
    said = capsys.readouterr().out
    assert "vocab, 257 of embedding (257, 16), is not cut" in said


def test_a_mesh_that_is_not_here_is_planned_for_one_of_its_devices(capsys):
    flags = ("--model", "7b", "--param-dtype", "bfloat16", "--optimizer", "adamw")
    assert run(*flags, "--mesh", "data=8,fsdp=8") == 0
    said = capsys.readouterr().out
    assert "one device of --mesh data=8,fsdp=8" in said
    # An eighth of 13.48, 13.48 and 26.95; of 24 the rest is left.
    assert rows(said)["adamw"][:3] == ["1.69", "1.69", "3.37"]
    assert rows(said)["adamw"][4] == "17.26"


def test_one_optimizer_leaf_by_leaf_and_as_json(capsys, tmp_path):
    path = tmp_path / "plans.json"
    flags = ("--model", "60m", "--leaves-of", "galore", "--json", path)
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "['blocks']['mlp']['up']" in said
    assert "512 -> 128" in said
    (plan,) = json.loads(path.read_text()).values()
    assert plan["optimizer_bytes"] == sum(plan["state_bytes"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "8b"], "--model '8b' is not known; choose one of tiny"),
        (["--memory", "much"], "--memory: 'much' is not a number of bytes"),
        (["--memory", "24"], "--memory 24 has no unit; give one, like 24GB"),
        (["--leaves-of", "sgd"], "--leaves-of 'sgd' is not known; choose one of adamw"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--mesh", "fsdp=3"], "--mesh fsdp=3 does not divide embed, 128 or heads"),
        (["--mesh", "fsdp"], "--mesh fsdp: 'fsdp' is not one of data, fsdp, tensor"),
        (["--vocabulary-size", "0"], "--vocabulary-size must be at least 1"),
        (["--optimizer", "muon", "--rank", "4"], "--rank has no effect: muon has no"),
        (["--block-state-bytes", "10"], "adarankgrad: "),
        (
            ["--ranks", "3"],
            "--ranks is not a flag of this command; did you",
        ),
        (
            ["--optimizer", "adamw", "--json", "/nowhere/plans.json"],
            "/nowhere/plans.json",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    assert run(*flags) == 2
    assert message in one_error_line(capsys)
