"""What is projected, how, and what is not and why; and that the rest is left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers
from lowrank_optax.codes import bytes_of

pytestmark = pytest.mark.usefixtures("fast_compilation")
PARAMS = {
    "blocks": jnp.ones((3, 16, 8)),
    "bias": jnp.ones(8),
    "head": jnp.ones((8, 20)),
    "heads": jnp.ones((8, 3, 4)),
    "scalar": jnp.ones(()),
    "small": jnp.ones((50, 4)),
    "steps": jnp.ones((9, 9), jnp.int32),
}


def _numbers(params):
    numbers = lowrank_optax.dimension_numbers_by_shape(params)
    return {**numbers, "heads": LowRankDimensionNumbers(0, (1, 2)), "head": None}


def _low_rank(**parts):
    parts = {"rank": 4, "dimension_numbers": _numbers, **parts}
    return lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), **parts)


SENTENCES = {
    "blocks": "3x16x8: 3 x (16 x 8), columns projected, 8 -> 4",
    "bias": "8: full size, fewer than two axes",
    "head": "8x20: full size, its dimension numbers are None",
    "heads": "8x3x4: (8 x 12), axes (0) x (1, 2), rows projected, 8 -> 4",
    "scalar": "scalar: full size, fewer than two axes",
    "small": "50x4: full size, short side 4 is not above rank 4",
    "steps": "9x9: full size, its dtype int32 is not a real floating one",
}


@pytest.mark.parametrize("kind", ["arrays", "shapes"])
def test_projections_says_what_happens_to_each_leaf_and_why(kind):
    params = PARAMS if kind == "arrays" else jax.eval_shape(lambda: PARAMS)
    found = lowrank_optax.projections(_low_rank(), params)
    assert {path: str(plan) for path, plan in found.items()} == {
        f"['{name}']": f"['{name}'] {sentence}" for name, sentence in SENTENCES.items()
    }


def test_projections_agrees_with_the_state():
    found = lowrank_optax.projections(_low_rank(), PARAMS)
    in_state = lowrank_optax.subspaces(_low_rank().init(PARAMS))
    projected = {path: plan for path, plan in found.items() if plan.is_projected}
    assert set(projected) == set(in_state)
    for path, plan in projected.items():
        assert in_state[path].basis.shape[-2:] == (
            plan.view.projected_size,
            plan.capacity,
        )


def test_projections_reaches_into_chains_partitions_and_masks():
    labels = {name: "low" if name == "head" else "full" for name in PARAMS}
    low = optax.chain(optax.clip(1.0), _low_rank(dimension_numbers=None))
    optimizer = optax.partition({"low": low, "full": optax.sgd(0.1)}, labels)
    found = lowrank_optax.projections(optimizer, PARAMS)
    assert found["['head']"].is_projected
    assert found["['blocks']"].reason == "not given to a low-rank transformation"
    assert list(found) == [f"['{name}']" for name in sorted(PARAMS)]


def test_leaves_that_are_none_are_no_leaves():
    params = {"absent": None, "w": jnp.ones((9, 8))}
    tx = _low_rank(dimension_numbers=None)
    assert list(lowrank_optax.projections(tx, params)) == ["['w']"]
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params))
    assert updates["absent"] is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"w": LowRankDimensionNumbers()}, r"no entry for \['v'\]"),
        (
            {"w": (0, 1), "v": None},
            r"dimension_numbers\['w'\]\[0\] must be LowRankDimensionNumbers, optax",
        ),
        (lambda params: {"v": None}, r"no entry for \['w'\]"),
        (LowRankDimensionNumbers(), r"no entry for \['v'\]"),
    ],
)
def test_numbers_that_are_missing_or_of_another_kind_raise(numbers, message):
    with pytest.raises(ValueError, match=message):
        _low_rank(dimension_numbers=numbers).init(
            {"v": jnp.ones(3), "w": jnp.ones((9, 8))}
        )


@pytest.mark.parametrize("shape", [(9, 7), (10, 8), (2, 9, 8), (8,)])
def test_a_gradient_that_does_not_fit_the_state_raises(shape):
    tx = _low_rank(dimension_numbers=None)
    state = tx.init({"w": jnp.ones((9, 8))})
    with pytest.raises(ValueError, match=r"\['w'\]: .* not fit"):
        jax.eval_shape(tx.update, {"w": jnp.ones(shape)}, state)


def test_a_side_that_does_not_exist_raises():
    with pytest.raises(ValueError, match="side must be 'short' or 'long', got 'left'"):
        _low_rank(side="left")


# --- what is not projected is the inner transformation's alone -------------------


def _steps(tx, grads):
    """Returns the updates of all steps."""

    def step(state, gradients):
        updates, state = tx.update(gradients, state)
        return state, updates

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)[1]


def _run(tx, grads):
    return jax.device_get(jax.jit(lambda g: _steps(tx, g))(grads))


def _gaussian(seed, *shape):
    draws = np.random.default_rng(seed).normal(size=(6, *shape))
    return jnp.asarray(draws, jnp.float32)


GRADS = {
    "w": _gaussian(0, 9, 7),
    "bias": _gaussian(1, 7),
    "scalar": _gaussian(2),
    "small": _gaussian(3, 9, 3),
}


def _compact(inner=None, **parts):
    return lowrank_optax.scale_by_low_rank(
        inner or optax.scale_by_adam(),
        rank=3,
        refresh=lowrank_optax.every(2, stagger=False),
        **parts,
    )


def test_leaves_at_full_size_get_bitwise_the_update_of_the_inner_optimizer():
    # Half of a number is exact: fused in one program and not in the other, trace has
    # the same bits. XLA compiles Adam to other last bits in each program.
    inner = optax.trace(0.5)
    found, plain = _run(_compact(inner), GRADS), _run(inner, GRADS)
    for name in ("bias", "scalar", "small"):
        np.testing.assert_array_equal(found[name], plain[name])
    assert np.any(found["w"] != plain["w"])


def test_scale_multiplies_projected_leaves_only():
    svd = lowrank_optax.exact_svd()
    found = _run(_compact(basis=svd, scale=0.25), GRADS)
    plain = _run(_compact(basis=svd), GRADS)
    # A power of two: exact.
    np.testing.assert_array_equal(found.pop("w"), 0.25 * plain.pop("w"))
    for name in found:
        np.testing.assert_array_equal(found[name], plain[name])


def test_another_leaf_changes_no_bit_and_another_seed_does():
    def updates(seed, grads):
        # No arithmetic inside: XLA compiles Adam to other last bits in each program.
        tx = _compact(optax.identity(), seed=seed)
        return _steps(tx, grads)["w"]

    run = jax.jit(updates)
    alone, again, other = (run(seed, {"w": GRADS["w"]}) for seed in (0, 0, 1))
    around = {"a": _gaussian(4, 8, 8), "z": _gaussian(5, 6, 5)}
    beside = run(0, {**around, "w": GRADS["w"]})
    np.testing.assert_array_equal(again, alone)
    np.testing.assert_array_equal(beside, alone)
    assert np.any(other != alone)


@pytest.mark.parametrize("method", [lowrank_optax.adarankgrad, lowrank_optax.galore])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_gradients_dtype_and_the_state_float32(method, dtype):
    params = {"w": jnp.ones((9, 7), dtype), "bias": jnp.ones(7, dtype)}
    tx = method(1e-3, rank=3, weight_decay=0.1)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    for found in (state, new_state):
        low_rank = found[0]
        assert low_rank.subspaces["w"].basis.dtype == jnp.float32
        assert low_rank.inner_state.mu["w"].dtype == jnp.float32
        assert low_rank.inner_state.nu["w"].dtype == jnp.float32


def test_a_gradient_of_half_precision_gets_the_update_of_its_float32_value():
    for dtype in (jnp.bfloat16, jnp.float16):
        half = GRADS["w"].astype(dtype)
        tx = _compact(basis=lowrank_optax.exact_svd())
        found = _run(tx, {"half": half, "single": half.astype(jnp.float32)})
        # One rounding, of the update itself.
        np.testing.assert_allclose(
            found["half"].astype(np.float32),
            found["single"],
            rtol=float(jnp.finfo(dtype).eps),
            atol=1e-5,
        )


def test_projections_answers_the_same_question_twice():
    # jax.eval_shape remembers the functions that it has traced.
    optimizer = _low_rank()
    first = lowrank_optax.projections(optimizer, PARAMS)
    assert lowrank_optax.projections(optimizer, PARAMS) == first


GRANULARITIES = {
    1: "['w'] 20x12: (20 x 12), columns projected, 12 -> 2",
    4: "['w'] 20x12: (20 x 12), columns projected, 3 -> 2, granularity 4",
    5: (
        "['w'] 20x12: (20 x 12), columns projected, 3 -> 2, granularity 4 "
        "(5 does not divide 12)"
    ),
    6: "['w'] 20x12: full size, at granularity 6 short side 2 is not above rank 2",
    100: "['w'] 20x12: full size, at granularity 12 short side 1 is not above rank 2",
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_projections_says_which_granularity_is_used(granularity):
    tx = lowrank_optax.vlorp(0.1, rank=2, granularity=granularity)
    plan = lowrank_optax.projections(tx, {"w": jnp.ones((20, 12))})["['w']"]
    assert str(plan) == GRANULARITIES[granularity]


# --- leaves that are seldom thought of ------------------------------------------------

METHODS = {
    "galore": lambda: lowrank_optax.galore(0.1, 4, update_proj_gap=2),
    "adarankgrad": lambda: lowrank_optax.adarankgrad(0.1, 4),
    "projfactor": lambda: lowrank_optax.projfactor(0.1, 4, 2),
    "low_rank_muon": lambda: lowrank_optax.low_rank_muon(0.1, 4),
    "fira": lambda: lowrank_optax.fira(0.1, 4),
    "low_bit": lambda: lowrank_optax.low_bit(lowrank_optax.galore(0.1, 4), min_size=1),
    "accumulate": lambda: lowrank_optax.accumulate(lowrank_optax.galore(0.1, 4), 1),
    "budget": lambda: lowrank_optax.galore(0.1, lowrank_optax.budget("2kB")),
}
EMPTY = [(0,), (0, 16), (16, 0), (0, 0), (0, 24, 16), (3, 0, 16)]


def _after_two(tx, params, grads):
    state, updates = tx.init(params), None
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state


@pytest.mark.parametrize("name", METHODS)
def test_empty_leaves_stay_at_full_size_and_change_nothing(name):
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)}
    empty = {f"z{i}": jnp.zeros(shape) for i, shape in enumerate(EMPTY)}
    expected, _ = _after_two(METHODS[name](), w, w)
    updates, _ = _after_two(METHODS[name](), w | empty, w | empty)
    assert {key: x.shape for key, x in updates.items()} == {
        key: x.shape for key, x in (w | empty).items()
    }
    # Another program.
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", EMPTY[1:])
def test_an_empty_leaf_is_said_to_be_empty(shape):
    params = {"z": jnp.zeros(shape)}
    for name, make in METHODS.items():
        if name == "budget":
            continue
        (plan,) = lowrank_optax.projections(make(), params).values()
        assert plan.reason == "it is empty"
        found = lowrank_optax.memory_plan(make(), params)
        assert found.optimizer_bytes == bytes_of(make().init(params))
        assert "full size, it is empty" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_python_numbers_are_leaves_as_arrays_are(name):
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)}
    tx = METHODS[name]()
    expected, _ = _after_two(tx, {**w, "t": jnp.asarray(1.0)}, {**w, "t": jnp.ones(())})
    params, grads = {**w, "t": 1.0}, {**w, "t": 1.0}
    updates, _ = _after_two(tx, params, grads)
    np.testing.assert_allclose(updates["t"], expected["t"], rtol=1e-6)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6)
    assert lowrank_optax.projections(tx, params).keys() == {"['w']", "['t']"}
    assert lowrank_optax.memory_plan(tx, params).parameter_bytes == 4 * (24 * 16 + 1)
    # Not compiled, they stay what they are up to the update itself.
    eager = tx.update(grads, tx.init(params), params)[0]
    assert np.all(np.isfinite(eager["t"]))


@pytest.mark.parametrize("wrapper", ["apply_if_finite", "stochastic_rounding"])
def test_wrappers_take_python_numbers_too(wrapper):
    params = {"t": 1.0, "h": jnp.ones(3, jnp.bfloat16)}
    tx = optax.sgd(0.5)
    if wrapper == "apply_if_finite":
        tx = lowrank_optax.apply_if_finite(tx)
    else:
        tx = optax.chain(tx, lowrank_optax.stochastic_rounding())
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["t"]) == -0.5


def test_eight_bits_are_cast_and_computed_in_float32():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(24, 16)), jnp.float32)
    narrow = w.astype(jnp.float8_e4m3fn)
    tx = _low_rank(dimension_numbers=None, basis=lowrank_optax.exact_svd())
    found, state = _after_two(tx, narrow, narrow)
    wide = narrow.astype(jnp.float32)
    expected, _ = _after_two(tx, wide, wide)
    assert state.subspaces.basis.dtype == jnp.float32
    # One rounding to three bits, of the update itself.
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, rtol=2**-4, atol=0.01
    )


def test_float64_of_numpy_is_computed_in_what_jax_has(recwarn):
    params = {"w": np.ones((24, 16))}
    for make in METHODS.values():
        jax.eval_shape(make().update, params, make().init(params), params)
        narrow = jax.tree.map(np.float32, params)
        plan = lowrank_optax.memory_plan(make(), params)
        assert plan == lowrank_optax.memory_plan(make(), narrow)
    assert not [x for x in recwarn if "float64" in str(x.message)]


def test_what_is_no_array_is_refused_by_name():
    params = {"w": jnp.ones((24, 16)), "activation": jax.nn.relu}
    tx = lowrank_optax.galore(0.1, 4)
    message = r"\['activation'\] is no array but .*; give .* arrays of a model alone"
    for refuse in (
        tx.init,
        lowrank_optax.accumulate(optax.sgd(0.1), 2).init,
        lambda params: lowrank_optax.projections(tx, params),
        lambda params: lowrank_optax.memory_plan(tx, params),
    ):
        with pytest.raises(TypeError, match=message):
            refuse(params)


# --- a state of another optimizer ----------------------------------------------------

OTHERS = {
    "another refresh rule": ("galore", "adarankgrad", "no trend"),
    "another residual": ("galore", "fira", "no residual"),
    "no basis": ("vlorp", "galore", "no basis"),
    "a basis": ("galore", "vlorp", "a basis"),
    "another rank": ("vlorp", "vlorp 3", r"\(16, 3\) .* 'mu' .*\(16, 4\).* rank"),
    "none of ours": ("adamw", "galore", "the state is a ScaleByAdamState, not that"),
}
STATES = {
    "adamw": lambda: optax.adamw(0.1),
    "galore": lambda: lowrank_optax.galore(0.1, 4),
    "adarankgrad": lambda: lowrank_optax.adarankgrad(0.1, 4),
    "fira": lambda: lowrank_optax.fira(0.1, 4),
    "vlorp": lambda: lowrank_optax.vlorp(0.1, 4, 1),
    "vlorp 3": lambda: lowrank_optax.vlorp(0.1, 3, 1),
}


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_another_optimizer_is_told_apart(case, refresh):
    made_by, given_to, message = OTHERS[case]
    params = {"w": jnp.ones((16, 9)), "b": jnp.ones(9)}
    state = STATES[made_by]().init(params)
    update = functools.partial(STATES[given_to]().update, refresh=refresh)
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(update, params, state, params)


def test_a_refresh_rule_without_a_state_goes_on_from_one_with():
    params = {"w": jnp.ones((16, 9))}
    state = STATES["adarankgrad"]().init(params)
    jax.eval_shape(STATES["galore"]().update, params, state, params)


@pytest.mark.parametrize("granularity", [0, -1, 1.5, True])
@pytest.mark.parametrize("method", [lowrank_optax.vlorp, lowrank_optax.projfactor])
def test_a_granularity_below_one_is_refused(method, granularity):
    with pytest.raises(ValueError, match="granularity must be an int >= 1, got"):
        method(0.1, rank=2, granularity=granularity)


def test_a_random_basis_cannot_have_its_rank_by_energy():
    with pytest.raises(ValueError, match="a random basis captures no energy"):
        lowrank_optax.vlorp(0.1, rank=lowrank_optax.energy_rank(4))
