"""The optimizer's state in the host's memory: equal runs, and what moves when."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.distribution import host_memory
from experiments.distribution.host_memory import (
    PINNED,
    check_memory,
    is_pinned,
)
from experiments.distribution.rules import bytes_per_device, memory_plan
from experiments.errors import UserError
from experiments.run.assemble import assemble
from experiments.run.config import parse
from experiments.run.plans import on_a_device
from tests.experiments.small_runs import read_lines, run

ADAPTIVE = [
    *("--optimizer", "adarankgrad", "--rank", 12, "--min-rank", 1, "--threshold", 0.9),
    *("--compact", "--compact-every", 1),
    *("--gradients", "subspace", "--refresh", "sketch"),
]
RUNS = {
    "adamw": ["--optimizer", "adamw", "--accumulate", 2],
    "adarankgrad": ADAPTIVE,
    "relora": ["--optimizer", "relora", "--rank", 2, "--update-proj-gap", 2],
}


@pytest.fixture
def small(monkeypatch):
    # The arrays of the tests' model are small, too.
    monkeypatch.setattr(host_memory, "LEAST_BYTES", 256)


@pytest.mark.usefixtures("small", "one_device")
@pytest.mark.parametrize(
    "method",
    ["adamw", *(pytest.param(x, marks=pytest.mark.slow) for x in RUNS if x != "adamw")],
)
def test_a_run_with_its_state_in_host_memory_is_the_same_bit_for_bit(
    method, inputs, tmp_path
):
    flags = [*inputs, *RUNS[method], "--steps", 6, "--checkpoint-every", 2]
    pinned = [*flags, "--state-memory", PINNED]
    assert run(*flags, "--out", tmp_path / "device") == 0
    assert run(*pinned, "--out", tmp_path / "pinned") == 0
    expected = read_lines(tmp_path / "device")
    assert read_lines(tmp_path / "pinned") == expected
    summary = json.loads((tmp_path / "pinned/summary.json").read_text())
    # Columns are cut on the devices, and two steps follow.
    assert bool(summary["compactions"]) == (method == "adarankgrad")
    of_pinned = summary["bytes_per_device"]
    summary = json.loads((tmp_path / "device/summary.json").read_text())
    of_device = summary["bytes_per_device"]
    assert of_device["optimizer_state_in_host_memory"] == 0
    moved = of_pinned["optimizer_state_in_host_memory"]
    assert moved > 0.7 * of_device["optimizer_state"]
    assert moved + of_pinned["optimizer_state"] == of_device["optimizer_state"]
    # And it goes on from a checkpoint, in either memory.
    for words in (flags, pinned):
        half = tmp_path / f"half-{len(words)}"
        shutil.copytree(tmp_path / "pinned", half)
        shutil.rmtree(half / "checkpoints/6")
        (half / "summary.json").unlink()
        assert run(*words, "--out", half, "--resume") == 0
        assert read_lines(half)[-1] == expected[-1]


@pytest.mark.usefixtures("small")
def test_over_a_mesh_each_device_moves_its_share(inputs):
    words = [*map(str, inputs), "--optimizer", "adamw", "--mesh", "fsdp=4"]
    words += ["--state-memory", PINNED]
    parts = assemble(parse(words), lambda text: None)
    _, state = parts.abstract_state()
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state)}
    assert kinds == {"device", PINNED}
    large = [x for x in jax.tree.leaves(state) if is_pinned(x) and x.ndim == 3]
    assert large
    assert not any(x.sharding.is_fully_replicated for x in large)
    # The plan has what is left on a device.
    plan = memory_plan(parts.tx, parts.param_shapes, PINNED)
    left = [x for x in jax.tree.leaves(state) if not is_pinned(x)]
    assert on_a_device(plan).optimizer == bytes_per_device(left)
    whole = memory_plan(parts.tx, parts.param_shapes)
    assert on_a_device(whole).optimizer == bytes_per_device(state)


def test_small_arrays_stay_on_the_devices():
    sharding = SingleDeviceSharding(jax.devices()[0])

    def shape(*lengths):
        return jax.ShapeDtypeStruct(lengths, jnp.float32, sharding=sharding)

    found = host_memory.in_host_memory([shape(), shape(128, 127), shape(128, 128)])
    assert [is_pinned(x) for x in found] == [False, False, True]


def test_a_backend_without_this_memory_is_refused_in_a_line():
    class Device:
        device_kind, platform = "toy", "tpu"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    mesh = type("Mesh", (), {"local_devices": [Device()]})
    check_memory("device", mesh)
    with pytest.raises(UserError) as error:
        check_memory(PINNED, mesh)
    assert str(error.value) == (
        "--state-memory pinned_host: JAX offers the memories device for toy (tpu); "
        "leave --state-memory out"
    )
