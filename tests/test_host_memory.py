"""A state in the host's memory: what a step moves to the devices, and when."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lowrank_optax.training.host_memory import (
    PINNED,
    is_pinned,
    moved_late,
    on_devices,
)


def test_moments_come_behind_the_gradients_and_bases_before_them():
    device = SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind(PINNED)
    state = {"basis": jnp.ones((4, 4)), "mu": jnp.ones((4, 4)), "count": jnp.ones(())}
    kinds = {"basis": host, "mu": host, "count": device}

    def step(state, x):
        used = on_devices(state, kinds)
        gradient = used["basis"] @ x
        left = {**used, "basis": used["basis"] + 1.0, "count": used["count"] + 1}
        state = moved_late(state, kinds, used, left, gradient)
        return {**state, "mu": state["mu"] + gradient}

    state = jax.tree.map(jax.device_put, state, kinds)
    text = jax.jit(step).lower(state, jnp.eye(4)).as_text()
    barrier = text.index("optimization_barrier")
    # Only what the gradients left alone waits for them, and is moved anew.
    assert re.findall(r"%arg\d+", text[barrier:].split(" :")[0]) == ["%arg2"]
    found = jax.jit(step, out_shardings=kinds)(state, jnp.eye(4))
    assert jnp.array_equal(jnp.asarray(found["mu"]), jnp.full((4, 4), 2.0))
    assert {name: is_pinned(x) for name, x in found.items()} == {
        **{"basis": True, "mu": True, "count": False},
    }
