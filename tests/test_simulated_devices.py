"""Refreshes on simulated devices come to an end: LAPACK calls do not wait for others.

Each process has its own count of devices, and is ended from outside when it hangs: it
cannot say so itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A process takes a minute, most of it compilation; a hang has no end.
SECONDS = 600

UPDATES = """
import sys
import jax, jax.numpy as jnp
import lowrank_optax as lo

count = int(sys.argv[1])
assert jax.device_count() == count
mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec
whole = jax.sharding.NamedSharding(mesh, P())
cut = jax.sharding.NamedSharding(mesh, P(None, "data"))
# Stacks, whose batched LAPACK calls jaxlib cuts in pieces, in several leaves.
shapes = {f"w{i}": (8, 64, 160) for i in range(2)} | {"v": (8, 160, 160)}
keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes))))
params = {k: jax.random.normal(keys[k], shape) for k, shape in shapes.items()}
methods = {
    "galore": lambda: lo.galore(1e-2, rank=40, update_proj_gap=1),
    "adarankgrad": lambda: lo.adarankgrad(1e-2, rank=40, refresh=lo.every(1)),
    "sumo": lambda: lo.sumo(1e-2, rank=40, refresh=lo.every(1)),
    "low_rank_muon": lambda: lo.low_rank_muon(1e-2, rank=40, refresh=lo.every(1)),
    "vlorp": lambda: lo.vlorp(1e-2, rank=40, granularity=1, refresh=lo.every(1)),
}
for name, method in methods.items():
    for sharding in (whole, cut) if name in ("galore", "adarankgrad") else (cut,):
        placed = jax.device_put(params, sharding)
        tx = method()
        state, update = jax.jit(tx.init)(placed), jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(placed, state, placed)
        jax.block_until_ready(updates)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))
    print(name, flush=True)
"""


def _run(*words: object, devices: int) -> str:
    """Returns what a process prints that sees so many devices; it has to end."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    # As a user has it: two programs may be in flight.
    environment.pop("JAX_CPU_ENABLE_ASYNC_DISPATCH", None)
    try:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode()
        pytest.fail(f"no end within {SECONDS} s; it had said: {said[-500:]!r}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_refreshes_end_on_simulated_devices(devices):
    said = _run("-c", UPDATES, devices, devices=devices)
    assert said.split() == ["galore", "adarankgrad", "sumo", "low_rank_muon", "vlorp"]


@pytest.mark.slow
def test_the_experiment_ends_on_simulated_devices(tmp_path):
    text = tmp_path / "some.txt"
    lines = (f"line {i} has the number {i * i} in it\n" for i in range(6000))
    text.write_text("".join(lines))
    said = _run(
        *("-m", "experiments.pretrain_llama", "--data", text, "--steps", 20),
        *("--optimizer", "adarankgrad", "--out", tmp_path / "out"),
        devices=4,
    )
    assert "validation loss" in said
    assert "step 20/20" in said
