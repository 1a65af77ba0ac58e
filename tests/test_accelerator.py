"""The benchmark for an accelerator runs whole, on toys, wherever the tests run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from benchmarks.accelerator import filled, records, workers
from benchmarks.accelerator.stacks import layer_by_layer, over_layers
from benchmarks.accelerator.units import Unit, catalogue

ROOT = Path(__file__).parents[1]


def run(out: Path, *options: str) -> dict[str, dict]:
    """Returns what each stage's file holds after the command."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--smoke", "--out", out]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=900)
    return {stage: records.load(out, stage) for stage in records.FILES}


def fields(node, *path):
    """Yields (path, value) of everything that is neither a dict nor a list."""
    if not isinstance(node, dict | list):
        yield path, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from fields(value, *path, key)


@pytest.mark.slow
def test_every_measurement_of_the_smoke_run_is_there_and_finite(tmp_path):
    expected = catalogue(is_smoke=True)
    for stage, record in run(tmp_path).items():
        assert record["environment"]["jax"] == jax.__version__
        assert record["environment"]["device"].startswith("cpu")
        measurements = record["measurements"]
        names = [unit.name for unit in expected if unit.stage == stage]
        assert list(measurements) == names
        for path, value in fields(measurements):
            assert "error" not in path, (path, value)
            assert "skipped" not in path, (path, value)
            may_be_zero = path[1] == "seconds" or path[-1] in ("outputs", "temporaries")
            if isinstance(value, float | int) and not may_be_zero:
                assert math.isfinite(value), path
                assert value > 0 or isinstance(value, bool), path
        for name in names:
            assert measurements[name]["finished"]
            found = measurements[name].get("alternatives", {name: measurements[name]})
            assert all("milliseconds" in row for row in found.values())


def test_what_the_time_does_not_allow_has_a_reason(tmp_path):
    for record in run(tmp_path, "--minutes", "0").values():
        assert record["measurements"]
        for result in record["measurements"].values():
            assert result == {"skipped": "0 s were left of all"}


def test_a_process_that_dies_leaves_an_error_beside_what_it_found(tmp_path):
    unit = Unit("a", "unknown", "", least=1, most=60, measure=lambda write, end: None)
    records.start(tmp_path, "a", "")
    records.add(tmp_path, "a", "unknown", {"rank": 3})
    workers.run([unit], tmp_path, 60, tmp_path, is_smoke=True)
    found = json.loads(records.path_of(tmp_path, "a").read_text())["measurements"]
    assert found["unknown"]["rank"] == 3
    assert found["unknown"]["error"].startswith("the process ended with status 1")


def test_an_error_does_not_end_the_process(tmp_path):
    def fail(write, deadline):
        write({"rank": 3})
        raise ValueError("first\nsecond")

    def succeed(write, deadline):
        write({"rank": 4})

    units = [Unit("a", x.__name__, "", 1, 60, x) for x in (fail, succeed)]
    records.start(tmp_path, "a", "")
    workers.measure(units, tmp_path, 60, is_smoke=True)
    found = records.load(tmp_path, "a")["measurements"]
    assert found["fail"] == {"rank": 3, "error": "ValueError: first\nsecond"}
    assert found["succeed"] == {"rank": 4, "finished": True}


def test_noise_is_spread_evenly_and_differs_by_place_and_seed():
    one, other = filled.noise((64, 128), 1), filled.noise((64, 128), 2)
    assert jnp.max(jnp.abs(one)) <= 1
    # Means of 8192 numbers: five standard deviations.
    assert abs(jnp.mean(one)) < 5 * (1 / 3 / 8192) ** 0.5
    assert abs(jnp.mean(one**2) - 1 / 3) < 5 * (4 / 45 / 8192) ** 0.5
    assert abs(jnp.mean(one * other)) < 5 * (1 / 9 / 8192) ** 0.5
    assert len(np.unique(one)) > 8000


@pytest.mark.parametrize("bits", [None, 8])
def test_a_filled_state_updates_to_finite_numbers_and_is_due_for_nothing(bits):
    params = {"w": jnp.ones((2, 96, 64))}
    tx = lowrank_optax.low_bit(lowrank_optax.galore(1.0, 8), bits, bits)
    state = filled.state_like(tx, params, jnp.uint32(1))
    grads = {"w": filled.noise((2, 96, 64), 3)}
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert jnp.all(jnp.isfinite(updates["w"]))
    assert jnp.any(updates["w"] != 0)
    ages = [x for path, x in jax.tree.leaves_with_path(after) if "age" in str(path)]
    np.testing.assert_array_equal(ages[0], [1, 1])


@pytest.mark.parametrize("stack", [over_layers, layer_by_layer])
def test_stacks_are_updated_as_their_layers_are_alone(stack):
    tx = optax.contrib.galore(0.1, rank=4, update_proj_gap=2)
    stacked, grads = stack(tx), {"w": filled.noise((3, 12, 8), 1)}
    state = stacked.init(grads)
    alone = [tx.init({"w": grads["w"][i]}) for i in range(3)]
    for count in range(3):
        updates, state = stacked.update(grads, state, grads)
        for i in range(3):
            layer = {"w": grads["w"][i]}
            expected, alone[i] = tx.update(layer, alone[i], layer)
            # Products of float32 in another order.
            np.testing.assert_allclose(
                updates["w"][i], expected["w"], rtol=1e-4, atol=1e-5, err_msg=str(count)
            )
