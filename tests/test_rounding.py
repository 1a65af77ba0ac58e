"""Stochastic rounding: right on average, repeated by its seed, exact where due."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.storage.rounding import round_to_bfloat16

DRAWS = 40_000


@pytest.mark.parametrize(
    "value", [1.003, -1.003, 0.02007, 3.1e-39, -7.7e-5, 255.3, 1.0, 0.0]
)
def test_the_mean_is_the_value(value):
    rounded = round_to_bfloat16(jnp.full(DRAWS, value), jax.random.key(0))
    draws = np.asarray(rounded, np.float64)
    value = float(np.float32(value))
    low, high = draws.min(), draws.max()
    assert low <= value <= high
    assert len(np.unique(draws)) <= 2
    # Four standard errors of a mean of two neighbours, and float32's own rounding.
    spread = (high - low) / 2 / DRAWS**0.5
    assert abs(draws.mean() - value) <= 4 * spread + 1e-7 * abs(value)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, 1.5, -2.0])
def test_what_bfloat16_holds_stays(value):
    rounded = round_to_bfloat16(jnp.full(1000, value), jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.float32(value))


def trained(seed, steps=20, dtype=jnp.bfloat16):
    params = {"w": jnp.ones((64, 32), dtype), "norm": jnp.ones(8, jnp.float32)}
    optimizer = optax.chain(optax.sgd(1.0), lowrank_optax.stochastic_rounding(seed))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, -5e-4, p.dtype), params)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_small_updates_are_not_lost():
    params, state = trained(0)
    assert params["w"].dtype == jnp.bfloat16
    assert state[1].count == 20
    # 20 updates of 5e-4: nearest rounding would not move 1 at all. A step is 1/128, and
    # the sum of 20 has a standard deviation of 20^0.5 / 256 x 0.5 at most, over 2,048.
    mean = np.asarray(params["w"], np.float64).mean()
    assert abs(mean - 1.01) < 4 * 20**0.5 / 256 / 2048**0.5


def test_float32_leaves_pass():
    params, _ = trained(0)
    np.testing.assert_allclose(params["norm"], 1.01, rtol=1e-6)


def test_the_seed_and_the_count_decide():
    first, _ = trained(0)
    again, _ = trained(0)
    other, _ = trained(1)
    np.testing.assert_array_equal(again["w"], first["w"])
    assert np.any(np.asarray(other["w"]) != np.asarray(first["w"]))


def test_apply_updates_gives_the_rounded_parameter_exactly():
    key = jax.random.key(2)
    params = {"w": (jax.random.normal(key, (4096,)) * 3).astype(jnp.bfloat16)}
    grads = {"w": jax.random.normal(jax.random.key(3), (4096,), jnp.bfloat16)}
    rounding = lowrank_optax.stochastic_rounding()
    updates, _ = rounding.update(grads, rounding.init(params), params)
    after = optax.apply_updates(params, updates)["w"]
    exact = params["w"].astype(jnp.float32) + updates["w"]
    np.testing.assert_array_equal(after.astype(jnp.float32), exact)


def test_params_are_asked_for():
    rounding = lowrank_optax.stochastic_rounding()
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="needs params in update"):
        rounding.update(params, rounding.init(params))


def test_leaves_of_one_shape_are_rounded_by_draws_of_their_own():
    """A draw is a function of the seed, the count and the leaf's path."""
    params = {name: jnp.ones((64, 8), jnp.bfloat16) for name in "ab"}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.float32), params)
    rounding = lowrank_optax.stochastic_rounding()
    updates, state = rounding.update(grads, rounding.init(params), params)
    assert np.any(np.asarray(updates["a"]) != np.asarray(updates["b"]))
    later, _ = rounding.update(grads, state, params)
    assert np.any(np.asarray(later["a"]) != np.asarray(updates["a"]))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001])
def test_no_number_with_any_bits_stays_no_number(bits):
    """A carry out of the lower bits, or their loss, would make it 0 or infinite."""
    value = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    rounded = round_to_bfloat16(jnp.full(1000, value), jax.random.key(1))
    assert np.all(np.isnan(np.asarray(rounded, np.float32)))
