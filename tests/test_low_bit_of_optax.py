"""``low_bit`` around Optax' own transformations, and inside its wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.codes import is_coded
from tests.suite import random_like, run, types

PARAMS = random_like({"w": (64, 32), "v": (1024,)})
OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1),
    "adagrad": optax.adagrad(0.1),
    "adamax": optax.adamax(0.1),
    "ademamix": optax.contrib.ademamix(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lamb": optax.lamb(0.1),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "sgd": optax.sgd(0.1, 0.9, nesterov=True),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.1),
}
SLOW = ("adabelief", "adamax", "amsgrad", "lamb", "radam", "rmsprop", "yogi")
# Beside what low_bit knows.
MOMENTS = {"sm3": {"nu": "first"}}


def low_bit(optimizer, **options):
    return lowrank_optax.low_bit(optimizer, min_size=256, block=32, **options)


def paths(state):
    found = jax.tree.leaves_with_path(state, is_leaf=is_coded)
    return {jax.tree_util.keystr(path) for path, leaf in found if is_coded(leaf)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in OPTIMIZERS
    ],
)
def test_updates_are_nearly_those_in_float32(name):
    plain = OPTIMIZERS[name]
    coded = low_bit(plain, moments=MOMENTS.get(name))
    state = coded.init(PARAMS)
    assert paths(state)
    ours, _ = run(jax.jit(coded.update), state, PARAMS, range(6))
    theirs, _ = run(jax.jit(plain.update), plain.init(PARAMS), PARAMS, range(6))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Rounding is right on average, and a step of a code is 1 % of the largest. The
        # signs of lion alone turn where it is near zero.
        most = 0.3 if name == "lion" else 0.05
        assert np.linalg.norm(one - other) < most * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("optimizer", "record"),
    [
        (optax.sm3(0.1), "ScaleBySM3State"),
        (optax.contrib.sophia(0.1), "SophiaState"),
    ],
)
def test_what_calls_something_signed_nu_is_refused(optimizer, record):
    """Its negative half would be lost, and every parameter drift to one side."""
    with pytest.raises(ValueError, match=rf'{record}.nu.*moments={{"nu": "first"}}'):
        low_bit(optimizer).init(PARAMS)
    low_bit(optimizer, moments={"nu": "first"}).init(PARAMS)
    lowrank_optax.low_bit(optimizer, None, 8).init(PARAMS)


def test_a_second_moment_below_zero_is_not_a_number():

    def update(updates, state, params=None):
        del state, params
        return updates, optax.ScaleByRmsState(nu=updates)

    init = optax.scale_by_rms().init
    optimizer = low_bit(optax.GradientTransformation(init, update))
    grads = {"w": PARAMS["w"], "v": jnp.abs(PARAMS["v"])}
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    nu = jax.tree.map(lowrank_optax.decode, state.nu, is_leaf=is_coded)
    np.testing.assert_array_equal(np.isnan(nu["w"]), PARAMS["w"] < 0)
    assert np.all(np.isfinite(nu["v"]))


def test_a_state_without_a_known_field_is_refused_by_the_names_that_it_has():
    with pytest.raises(ValueError, match=r"knows no field.* of g, m, n, v name"):
        low_bit(optax.adan(0.1)).init(PARAMS)
    kinds = {"m": "first", "v": "first", "n": "second"}
    state = low_bit(optax.adan(0.1), moments=kinds).init(PARAMS)
    assert len(paths(state)) == 6
    # Nothing to be coded: no moments, factors of moments, or small ones.
    low_bit(optax.sgd(0.1)).init(PARAMS)
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    low_bit(factored).init({"w": jnp.ones((16, 64, 32))})
    lowrank_optax.low_bit(optax.adan(0.1)).init(PARAMS)


def test_what_hands_on_a_part_of_the_parameters_goes_outside():
    params = optax.LookaheadParams.init_synced(PARAMS)
    fast = optax.adam(0.1)
    with pytest.raises(ValueError, match=r"give optax.lookahead\(low_bit"):
        low_bit(optax.lookahead(fast, 5, 0.5)).init(params)
    assert paths(optax.lookahead(low_bit(fast), 5, 0.5).init(params))


def test_an_integer_leaf_keeps_its_moments_dtype():
    """Optax makes float32 of them at the first update."""
    params = {**PARAMS, "i": jnp.ones((64, 32), jnp.int32)}
    grads = {**PARAMS, "i": params["i"]}
    optimizer = low_bit(optax.adam(0.1))
    state = optimizer.init(params)
    for _ in range(3):
        updates, after = optimizer.update(grads, state, params)
        assert types(after) == types(state)
        state = after
    alone = low_bit(optax.adam(0.1))
    state = alone.init(PARAMS)
    for _ in range(3):
        wanted, state = alone.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["w"], wanted["w"])


def test_a_state_may_get_arrays_that_it_did_not_have():
    """As optax.monitor's measurements at the first update."""
    monitor = optax.monitor({"norm": optax.tree.norm})
    optimizer = low_bit(optax.chain(monitor, optax.adam(0.1)))
    state = optimizer.init(PARAMS)
    for _ in range(2):
        _, state = optimizer.update(PARAMS, state, PARAMS)
    assert float(state[0].measurements["norm"]) == pytest.approx(
        float(optax.tree.norm(PARAMS))
    )
    assert len(paths(state)) == 4
