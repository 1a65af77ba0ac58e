"""The properties that every optimizer of the table has, at a rank below min(n, m)."""

import ast
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from tests.suite import (
    FLOAT,
    RANK,
    ROWS,
    SHAPES,
    SMALL,
    Row,
    abstract,
    compiled,
    gradients,
    run,
    types,
    zeros,
)

pytestmark = pytest.mark.usefixtures("fast_compilation")

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_tree = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
# Every tree in float32; what half precision adds does not depend on the tree.
HALF = ("tall", "stacked")
every_tree_and_dtype = pytest.mark.parametrize(
    ("tree", "dtype"),
    [
        *((tree, jnp.float32) for tree in SHAPES),
        *((tree, dtype) for tree in HALF for dtype in (jnp.bfloat16, jnp.float16)),
    ],
)

# The same operations compiled into another program are fused and ordered otherwise: a
# few units of float32 rounding, which the inverse Cholesky factors of the range finder
# and the root in Adam enlarge. Wrong mathematics is off by 0.01 and more.
OTHER_PROGRAM = {"rtol": 2e-3, "atol": 2e-5}


def assert_close(actual, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **OTHER_PROGRAM), actual, expected
    )


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@every_tree_and_dtype
@every_row
def test_updates_have_the_structure_shapes_and_dtypes_of_the_gradients(
    row, tree, dtype
):
    optimizer, params = row.build(0.1), abstract(SHAPES[tree], dtype)
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.map(_shape_and_dtype, updates) == jax.tree.map(
        _shape_and_dtype, params
    )


def _shape_and_dtype(x):
    return x.shape, x.dtype


@every_tree_and_dtype
@every_row
def test_update_keeps_the_type_of_the_state_through_cond(row, tree, dtype):
    _trace_two_conditional_updates(row, abstract(SHAPES[tree], dtype))


@every_tree
@every_row
def test_update_keeps_the_type_of_a_float64_state(row, shapes):
    with jax.enable_x64(True):
        _trace_two_conditional_updates(row, abstract(shapes, jnp.float64))


def _trace_two_conditional_updates(row, params):
    optimizer = row.build(0.1)

    def two_updates(params, condition):
        state = before = optimizer.init(params)
        for _ in range(2):
            # cond itself refuses branches whose types differ.
            _, state = jax.lax.cond(
                condition,
                lambda state: optimizer.update(params, state, params),
                lambda state: (params, state),
                state,
            )
            assert types(state) == types(before)

    jax.eval_shape(two_updates, params, jax.ShapeDtypeStruct((), bool))


@every_row
def test_float64_gradients_are_projected_in_float64(row):
    with jax.enable_x64(True):
        state = jax.eval_shape(row.build(0.1).init, abstract(SMALL, jnp.float64))
        large = [x for x in jax.tree.leaves(state) if x.ndim > 1]
        assert {x.dtype for x in large} == {jnp.dtype(jnp.float64)}


@every_row
def test_bfloat16_gradients_give_the_rounded_updates_of_float32(row):
    optimizer, update, _ = compiled(row)
    params, half = zeros(SMALL), zeros(SMALL, jnp.bfloat16)
    state, half_state = optimizer.init(params), optimizer.init(half)
    for step in range(5):
        grads = gradients(half, step)
        actual, half_state = update(grads, half_state, half)
        wide = optax.tree.cast(grads, jnp.float32)
        expected, state = update(wide, state, params)
        # Lifting and the learning rate round once each; entries are 0.1 and below.
        eps = float(jnp.finfo(jnp.bfloat16).eps)
        np.testing.assert_allclose(
            np.asarray(actual["layers"], np.float32),
            expected["layers"],
            rtol=2 * eps,
            atol=0.01 * eps,
        )


@every_tree
@every_row
def test_init_on_shapes_alone_gives_the_state_of_init_on_arrays(row, shapes):
    optimizer = row.build(0.1)
    state = optimizer.init(zeros(shapes))
    assert_same_bits(optimizer.init(abstract(shapes)), state)
    assert types(optimizer.init(abstract(shapes))) == types(state)
    traced = jax.eval_shape(optimizer.init, abstract(shapes))
    assert types(traced) == types(state)


@every_tree
@every_row
def test_init_never_returns_one_buffer_twice(row, shapes):
    leaves = jax.tree.leaves(row.build(0.1).init(zeros(shapes)))
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)


@every_row
def test_a_donated_step_is_the_step(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    donated = jax.jit(optimizer.update, donate_argnums=(1,))
    state = optimizer.init(params)
    expected, _ = run(update, state, params, range(3))
    actual, _ = run(donated, optimizer.init(params), params, range(3))
    assert_close(actual, expected)


@every_tree
@every_row
def test_state_bytes_are_those_of_the_docstring(row, shapes):
    """b r/c + moments a c r floats per matrix, five scalars, the rule's, counters."""
    params = zeros(shapes)
    leaves = jax.tree.leaves(params)
    at_full_size = [x for x in leaves if x.ndim < 2]
    expected = FLOAT + _bytes(row.at_full_size(0.1).init(at_full_size))
    for leaf in leaves:
        if leaf.ndim >= 2:
            *stack, n, m = leaf.shape
            expected += int(np.prod(stack)) * _bytes_of_matrix(row, n, m)
    assert _bytes(row.build(0.1).init(params)) == expected


def _bytes_of_matrix(row: Row, n: int, m: int) -> int:
    short, long = sorted((n, m))
    b, a = (long, short) if row.is_long else (short, long)
    c = row.granularity if b % row.granularity == 0 else 1
    numbers = row.moments * a * c * row.rank + 5 + row.trend
    numbers += row.has_basis * (b // c) * row.rank
    numbers += row.factored * (a * c + b // c)
    return FLOAT * numbers


def _bytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@functools.cache
def _eager_updates(row):
    """Updates of a refresh and of a step without one: each call compiles anew."""
    optimizer, params = row.build(0.1), zeros(SMALL)
    return run(optimizer.update, optimizer.init(params), params, range(2))[0]


@every_row
def test_eager_is_jitted(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    jitted, _ = run(update, optimizer.init(params), params, range(2))
    assert_close(_eager_updates(row), jitted)


@every_row
def test_leaves_at_full_size_are_bitwise_those_of_the_inner_optimizer(row):
    # Eager, and beside a leaf of the coordinates' shape: optax corrects the bias of the
    # whole tree in one program, whose roundings depend on what else is in it.
    # (2, 7, 5): 7 and 5 are primes, and every granularity is 1.
    coordinates = (2, 5, row.rank) if row.is_long else (2, 7, row.rank)
    inner, params = row.at_full_size(0.1), zeros({**SMALL, "layers": coordinates})
    if row.factored:
        # Its Adam has the leaves at full size to itself.
        del params["layers"]
    state = inner.init(params)
    for step, actual in enumerate(_eager_updates(row)):
        bias = gradients(zeros(SMALL), step)["bias"]
        expected, state = inner.update({**params, "bias": bias}, state, params)
        assert_same_bits(actual["bias"], expected["bias"])


@every_row
def test_repeated_calls_are_traced_once(row):
    optimizer, update, traces = compiled(row)
    params = zeros(SMALL)
    run(update, optimizer.init(params), params, range(1))
    before = len(traces)
    run(update, optimizer.init(params), params, range(10))
    assert len(traces) == before


@every_row
def test_no_operand_is_broadcast_across_ranks(row):
    optimizer = row.build(0.1)
    for shapes in SHAPES.values():
        params = abstract(shapes)
        with jax.numpy_rank_promotion("raise"):
            state = jax.eval_shape(optimizer.init, params)
            jax.eval_shape(optimizer.update, params, state, params)


WRAPPERS = {
    "chain": lambda row: optax.chain(
        optax.clip_by_global_norm(1e6), row.build(0.1), optax.scale(1.0)
    ),
    "partition": lambda row: optax.partition(
        {"low rank": row.build(0.1), "rest": optax.sgd(0.1)},
        {"layers": "low rank", "bias": "rest"},
    ),
    "masked": lambda row: optax.masked(row.build(0.1), {"layers": True, "bias": False}),
    "inject_hyperparams": lambda row: optax.inject_hyperparams(row.build)(
        learning_rate=0.1, seed=0
    ),
    "apply_if_finite": lambda row: optax.apply_if_finite(row.build(0.1), 3),
}


ALIASES = {
    "adarankgrad": {},
    "galore": {},
    "vlorp": {"granularity": 2},
    "projfactor": {"granularity": 2},
    "sumo": {},
    "low_rank_muon": {},
    "fira": {},
    "apollo": {},
    "ldadam": {},
}


@pytest.mark.parametrize("name", ALIASES)
def test_every_number_of_an_alias_but_those_of_shapes_may_be_injected(name):
    # Defaults are injected too, and so traced: no check may look at their values.
    shapes = {"rank": 4, **ALIASES[name]}
    alias = getattr(lowrank_optax, name)
    optimizer = optax.inject_hyperparams(alias, static_args=tuple(shapes))(
        0.1, **shapes
    )
    params = {"w": jnp.ones((16, 12)), "b": jnp.ones(3)}
    state = optimizer.init(params)
    updates, new_state = jax.eval_shape(optimizer.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", ALIASES)
def test_what_to_type_for_a_number_of_shapes_is_said(name):
    shapes = {"rank": 4, **ALIASES[name]}
    alias = getattr(lowrank_optax, name)
    optimizer = optax.inject_hyperparams(alias)(0.1, **shapes)
    with pytest.raises(TypeError, match=r"With optax\.inject_hyperparams") as error:
        optimizer.init({"w": jnp.ones((16, 12))})
    said = re.search(r"static_args=(\(.*?\))\)", str(error.value)).group(1)
    assert set(ast.literal_eval(said)) == set(shapes)


@functools.cache
def _wrapped(wrapper, row):
    optimizer = WRAPPERS[wrapper](row)
    return optimizer, jax.jit(optimizer.update)


@every_row
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_updates_are_the_bare_ones(row, wrapper):
    params = zeros(SMALL)
    wrapped, update_wrapped = _wrapped(wrapper, row)
    actual, _ = run(update_wrapped, wrapped.init(params), params, range(4))
    optimizer, update, _ = compiled(row)
    expected, _ = run(update, optimizer.init(params), params, range(4))
    assert_close([x["layers"] for x in actual], [x["layers"] for x in expected])


@every_row
def test_multi_steps_of_equal_gradients_are_plain_steps(row):
    params = zeros(SMALL)
    multi = optax.MultiSteps(row.build(0.1), 2).gradient_transformation()
    update_twice, state, actual = jax.jit(multi.update), multi.init(params), []
    for step in range(4):
        nothing, state = update_twice(gradients(params, step), state, params)
        assert optax.tree.norm(nothing) == 0
        updates, state = update_twice(gradients(params, step), state, params)
        actual.append(updates)
    optimizer, update, _ = compiled(row)
    expected, _ = run(update, optimizer.init(params), params, range(4))
    assert_close(actual, expected)


@every_row
def test_apply_if_finite_leaves_the_state_of_a_spoiled_update_alone(row):
    params = zeros(SMALL)
    optimizer, update = _wrapped("apply_if_finite", row)
    _, state = run(update, optimizer.init(params), params, range(2))
    spoiled = optax.tree.full_like(params, jnp.nan)
    updates, after = update(spoiled, state, params)
    assert optax.tree.norm(updates) == 0
    assert_same_bits(after.inner_state, state.inner_state)


@every_row
def test_unknown_extra_args_are_accepted(row):
    optimizer, params = row.build(0.1), abstract(SMALL)
    state = jax.eval_shape(optimizer.init, params)

    def update(updates, state, params):
        return optimizer.update(updates, state, params, nobody_expects_this=1)

    jax.eval_shape(update, params, state, params)


@every_tree
@every_row
def test_map_params_maps_subspaces_and_moments_and_nothing_else(row, shapes):
    optimizer = row.build(0.1)
    state = optimizer.init(zeros(shapes))
    marked = optax.tree.map_params(
        optimizer,
        lambda x: "parameter",
        state,
        transform_non_params=lambda x: "other",
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    is_counter = [
        getattr(path[-1], "name", "") == "count"
        for path, _ in jax.tree.leaves_with_path(state)
    ]
    expected = ["other" if counter else "parameter" for counter in is_counter]
    assert jax.tree.leaves(marked) == expected


@every_row
def test_a_constant_schedule_is_the_constant(row):
    params = zeros(SMALL)
    scheduled = row.build(optax.constant_schedule(0.1))
    actual, _ = run(jax.jit(scheduled.update), scheduled.init(params), params, range(4))
    optimizer, update, _ = compiled(row)
    expected, _ = run(update, optimizer.init(params), params, range(4))
    assert_close(actual, expected)


@every_row
def test_a_state_restored_within_a_period_continues_bitwise(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    _, state = run(update, optimizer.init(params), params, range(5))
    expected, end = run(update, state, params, range(5, 25))

    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(state))
    file.seek(0)
    leaves = list(np.load(file).values())
    target = jax.eval_shape(optimizer.init, params)
    restored = jax.tree.unflatten(jax.tree.structure(target), leaves)

    actual, restored_end = run(update, restored, params, range(5, 25))
    assert_same_bits((actual, restored_end), (expected, end))


@every_row
def test_the_seed_alone_decides_the_draws(row):
    params = zeros(SMALL)

    def states(seed):
        optimizer = row.build(0.1, seed=seed)
        update = jax.jit(optimizer.update)
        return run(update, optimizer.init(params), params, range(2))

    optimizer, update, _ = compiled(row)
    first = run(update, optimizer.init(params), params, range(2))
    other = states(1)
    assert_same_bits(states(0), first)
    differs = not np.array_equal(other[0][0]["layers"], first[0][0]["layers"])
    assert differs == row.is_random


PRINT_BITS = """
from tests.suite import *
jax.config.update("jax_disable_most_optimizations", True)
row = next(row for row in ROWS if row.is_random)
optimizer, update, _ = compiled(row)
params = zeros(SMALL)
updates, _ = run(update, optimizer.init(params), params, range(5))
print(jax.device_get(updates[-1]["layers"]).tobytes().hex())
"""


def test_another_process_draws_the_same_bits():
    row = next(row for row in ROWS if row.is_random)
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    updates, _ = run(update, optimizer.init(params), params, range(5))
    # Python salts the hashes of strings anew in each process.
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_BITS],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == np.asarray(updates[-1]["layers"]).tobytes().hex()


@every_row
def test_converges_on_least_squares_to_the_stated_loss(row):
    x_key, kernel_key, bias_key = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(x_key, (64, 12))
    y = x @ jax.random.normal(kernel_key, (12, 8))
    y += jax.random.normal(bias_key, (1, 8))
    steps = 300
    optimizer = row.build(optax.linear_schedule(row.learning_rate, 0.0, steps))

    def loss(params):
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((12, 8)), "bias": jnp.zeros((1, 8))}
    carry = (params, optimizer.init(params))
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)
    assert loss(trained) < row.loss * loss(params)


@every_row
def test_an_ensemble_under_vmap_gets_the_updates_of_its_members(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    ensemble = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    state = jax.vmap(optimizer.init)(ensemble)
    update_ensemble = jax.jit(jax.vmap(optimizer.update))
    members = [optimizer.init(params), optimizer.init(params)]
    for step in range(5):
        grads = [gradients(params, step), gradients(params, 100 + step)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
        updates, state = update_ensemble(stacked, state, ensemble)
        for index in range(2):
            expected, members[index] = update(grads[index], members[index], params)
            assert_close(jax.tree.map(lambda x, i=index: x[i], updates), expected)


@every_row
def test_scan_over_updates_is_the_loop(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    expected, _ = run(update, optimizer.init(params), params, range(6))

    def step(state, grads):
        updates, state = optimizer.update(grads, state, params)
        return state, updates

    grads = jax.tree.map(
        lambda *x: jnp.stack(x), *(gradients(params, step) for step in range(6))
    )
    _, actual = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(
        optimizer.init(params), grads
    )
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_extra_args_reach_the_inner_transformation():
    received = []

    def update(updates, state, params=None, **extra_args):
        received.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    optimizer = lowrank_optax.scale_by_low_rank(inner, RANK)
    params = abstract(SMALL)
    state = optimizer.init(params)
    jax.eval_shape(lambda g, s: optimizer.update(g, s, value=1.0), params, state)
    assert received[-1] == {"value": 1.0}


@every_row
def test_a_count_that_is_full_stays_so_and_updates_stay_finite(row):
    """int32 is full after 2^31 - 1 updates; one more would begin at -2^31."""
    optimizer, update, _ = compiled(row)
    params = zeros(SHAPES["tall"])
    full = jnp.iinfo(jnp.int32).max

    def filled(path, x):
        is_count = getattr(path[-1], "name", "") == "count"
        return jnp.full_like(x, full) if is_count else x

    _, state = update(gradients(params, 0), optimizer.init(params), params)
    state = jax.tree_util.tree_map_with_path(filled, state)
    updates, state = update(gradients(params, 1), state, params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
    scalars = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert max(map(int, scalars)) == full
    assert min(map(int, scalars)) >= 0
