"""Two low-rank transformations in one optimizer: all that looks into it finds both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers, Projected
from lowrank_optax.binding.optimizer import bind
from lowrank_optax.codes import bytes_of, is_coded
from tests.suite import gradients, types, zeros

pytestmark = pytest.mark.usefixtures("fast_compilation")

SHAPES = {"a": (2, 10, 7), "b": (12, 9), "bias": (9,)}
PARAMS = zeros(SHAPES)
# "a": rank 3 of the columns; "b": rank 2 of the rows, momentum.
RANKS = {"a": 3, "b": 2}
ROWS = {"a": 10, "b": 9}


def _first(**options):
    return lowrank_optax.scale_by_galore(3, 4, scale=1.0, **options)


def _second(**options):
    return lowrank_optax.scale_by_low_rank(
        optax.trace(0.9), 2, side="long", refresh=lowrank_optax.every(3), **options
    )


def _only(name):
    """Dimension numbers that leave all but one leaf at full size."""
    numbers = dict.fromkeys(SHAPES)
    axes = len(SHAPES[name])
    numbers[name] = LowRankDimensionNumbers(axes - 2, axes - 1)
    return numbers


OPTIMIZERS = {
    "masked": lambda: optax.chain(
        optax.masked(_first(), {"a": True, "b": False, "bias": False}),
        optax.masked(_second(), {"a": False, "b": True, "bias": False}),
        optax.scale(-0.1),
    ),
    "masked by functions": lambda: optax.chain(
        optax.masked(_first(), lambda tree: jax.tree.map(lambda x: x.ndim == 3, tree)),
        optax.masked(
            _second(),
            lambda tree: {
                k: jax.tree.map(lambda _, k=k: k == "b", tree[k]) for k in tree
            },
        ),
        optax.scale(-0.1),
    ),
    "partition": lambda: optax.chain(
        optax.partition(
            {"first": _first(), "second": _second(), "rest": optax.identity()},
            {"a": "first", "b": "second", "bias": "rest"},
        ),
        optax.scale(-0.1),
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def compiled(name):
    optimizer = OPTIMIZERS[name]()
    return optimizer, jax.jit(optimizer.update)


@functools.cache
def used(name):
    """Returns the state after two updates."""
    optimizer, update = compiled(name)
    state = optimizer.init(PARAMS)
    for step in range(2):
        _, state = update(gradients(PARAMS, step), state, PARAMS)
    return state


def assert_close(actual, expected):
    # Another program: float32 rounding, enlarged by Adam's division.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5),
        actual,
        expected,
    )


@every_optimizer
def test_each_leaf_gets_the_update_of_its_own_transformation(name):
    optimizer, update = compiled(name)
    state = optimizer.init(PARAMS)
    alone = {"a": _first(), "b": _second(), "bias": optax.identity()}
    # Sub-trees: draws depend on the path, and staggering on the leaves beside.
    states = {k: tx.init({k: PARAMS[k]}) for k, tx in alone.items()}
    steps = {k: jax.jit(tx.update) for k, tx in alone.items()}
    for step in range(7):
        grads = gradients(PARAMS, step)
        updates, state = update(grads, state, PARAMS)
        for k in alone:
            expected, states[k] = steps[k]({k: grads[k]}, states[k], {k: PARAMS[k]})
            assert_close(updates[k], -0.1 * expected[k])
    found = lowrank_optax.subspaces(state)
    assert np.all(found["['a']"].refreshes == 2)
    assert int(found["['b']"].refreshes) == 3


@every_optimizer
def test_reports_list_the_leaves_of_both(name):
    optimizer, _ = compiled(name)
    plans = lowrank_optax.projections(optimizer, PARAMS)
    assert {k: x.is_projected for k, x in plans.items() if x.is_projected} == {
        "['a']": True,
        "['b']": True,
    }
    assert {k: plans[f"['{k}']"].capacity for k in RANKS} == RANKS
    ranks = lowrank_optax.ranks(used(name))
    assert {k: np.max(x) for k, x in ranks.items()} == {"['a']": 3, "['b']": 2}
    assert lowrank_optax.capacities(used(name)) == {"['a']": 3, "['b']": 2}
    plan = lowrank_optax.memory_plan(optimizer, PARAMS)
    assert plan.optimizer_bytes == bytes_of(used(name))
    assert plan.state_bytes["basis"] == 4 * (2 * 7 * 3 + 12 * 2)
    assert {leaf.path for leaf in plan.leaves if leaf.is_projected} == {
        "['a']",
        "['b']",
    }


@every_optimizer
def test_both_are_resized(name):
    _, update = compiled(name)
    grown = lowrank_optax.resize(used(name), {"['a']": 5, "['b']": 4})
    assert lowrank_optax.capacities(grown) == {"['a']": 5, "['b']": 4}
    state = grown
    for step in range(2, 7):
        _, state = update(gradients(PARAMS, step), state, PARAMS)
    assert types(state) == types(grown)
    ranks = lowrank_optax.ranks(state)
    assert {k: np.max(x) for k, x in ranks.items()} == {"['a']": 5, "['b']": 4}
    # Nothing is out of use, and so nothing is cut.
    assert lowrank_optax.compact(state, bucket=1) is state
    # Until the new columns are filled they are: compact takes them back.
    back = lowrank_optax.compact(grown, bucket=1)
    jax.tree.map(np.testing.assert_array_equal, back, used(name))


@every_optimizer
def test_gradients_are_accumulated_inside_both(name):
    optimizer, update = compiled(name)
    accumulation = lowrank_optax.accumulate(optimizer, 2)
    state = accumulation.init(PARAMS)
    assert {k: x.coordinates.shape for k, x in state.sums.items() if k in RANKS} == {
        "a": (2, 10, 3),
        "b": (9, 2),
    }
    # Twice the same gradient: bases are those of the first micro-batch.
    window, plain = jax.jit(accumulation.update), optimizer.init(PARAMS)
    for step in range(4):
        grads = gradients(PARAMS, step)
        nothing, state = window(grads, state, PARAMS)
        assert optax.tree.norm(nothing) == 0
        updates, state = window(grads, state, PARAMS)
        expected, plain = update(grads, plain, PARAMS)
        assert_close(updates, expected)


def loss(params, x):
    y = jnp.tanh(x @ params["b"] + params["bias"])
    for layer in range(2):
        y = jnp.pad(y, ((0, 0), (0, 10 - y.shape[1])))
        y = jnp.tanh(y @ params["a"][layer])
    return jnp.sum(y**2)


@every_optimizer
def test_gradients_are_taken_inside_both(name):
    optimizer, update = compiled(name)
    params = jax.tree.map(lambda x: x / 3, gradients(PARAMS, 50))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 12)), jnp.float32)
    gradient = lowrank_optax.subspace_value_and_grad(loss, optimizer)
    _, full, state = jax.jit(gradient.full)(params, used(name), x)
    assert not gradient.refresh_due(params, state)
    assert list(gradient.due(params, state)) == ["['a']", "['b']"]
    _, inside, state = jax.jit(gradient)(params, state, x)
    assert {k: type(g) is Projected for k, g in inside.items()} == {
        "a": True,
        "b": True,
        "bias": False,
    }
    actual, after = update(inside, state, params)
    expected, wanted = update(full, state, params)
    assert_close((actual, after), (expected, wanted))


@every_optimizer
def test_both_are_kept_in_few_bits(name):
    inner, update = compiled(name)
    optimizer = lowrank_optax.low_bit(inner, 8, 4, min_size=1, block=8)
    state = optimizer.init(PARAMS)
    coded = {
        path: is_coded(subspace.basis)
        for path, subspace in lowrank_optax.subspaces(state).items()
    }
    assert coded == {"['a']": True, "['b']": True}
    low_bit = jax.jit(optimizer.update)
    plain = inner.init(PARAMS)
    for step in range(3):
        updates, state = low_bit(gradients(PARAMS, step), state, PARAMS)
        expected, plain = update(gradients(PARAMS, step), plain, PARAMS)
        for leaf in ("a", "b"):
            # A basis of 4 bits: a seventh of its column's largest entry, half a step.
            error = np.linalg.norm(updates[leaf] - expected[leaf])
            assert error < 0.35 * np.linalg.norm(expected[leaf])
    assert types(state) == types(optimizer.init(PARAMS))


# --- chained, each given every leaf --------------------------------------------------


def _chained():
    """The second sees what the first makes of its leaf, at full size, and so on."""
    return optax.chain(
        lowrank_optax.scale_by_low_rank(
            optax.trace(0.5), 3, dimension_numbers=_only("a")
        ),
        lowrank_optax.scale_by_low_rank(
            optax.trace(0.9), 2, dimension_numbers=_only("b")
        ),
    )


def test_a_plain_chain_takes_full_gradients():
    optimizer = _chained()
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    first = lowrank_optax.scale_by_low_rank(
        optax.trace(0.5), 3, dimension_numbers=_only("a")
    )
    second = lowrank_optax.scale_by_low_rank(
        optax.trace(0.9), 2, dimension_numbers=_only("b")
    )
    states = [first.init(PARAMS), second.init(PARAMS)]
    for step in range(3):
        grads = gradients(PARAMS, step)
        actual, state = update(grads, state, PARAMS)
        middle, states[0] = jax.jit(first.update)(grads, states[0], PARAMS)
        expected, states[1] = jax.jit(second.update)(middle, states[1], PARAMS)
        assert_close(actual, expected)
    plans = lowrank_optax.projections(optimizer, PARAMS)
    assert [k for k, x in plans.items() if x.is_projected] == ["['a']", "['b']"]
    plan = lowrank_optax.memory_plan(optimizer, PARAMS)
    assert plan.optimizer_bytes == bytes_of(state)


def test_a_plain_chain_accumulates_at_full_size_and_takes_no_gradients_inside():
    optimizer = _chained()
    assert bind(optimizer, PARAMS).shared == {
        (jax.tree_util.DictKey("a"),),
        (jax.tree_util.DictKey("b"),),
    }
    accumulation = lowrank_optax.accumulate(optimizer, 2)
    state = accumulation.init(PARAMS)
    assert jax.tree.map(jnp.shape, state.sums) == SHAPES
    window, update = jax.jit(accumulation.update), jax.jit(optimizer.update)
    plain = optimizer.init(PARAMS)
    for step in range(2):
        for _ in range(2):
            updates, state = window(gradients(PARAMS, step), state, PARAMS)
        expected, plain = update(gradients(PARAMS, step), plain, PARAMS)
        assert_close(updates, expected)
    gradient = lowrank_optax.subspace_value_and_grad(loss, optimizer)
    message = r"\['a'\] is given to two low-rank transformations"
    with pytest.raises(ValueError, match=message):
        gradient(PARAMS, optimizer.init(PARAMS), jnp.ones((6, 12)))


@pytest.mark.parametrize(
    "look",
    [
        lambda tx: bind(tx, PARAMS),
        lambda tx: lowrank_optax.projections(tx, PARAMS),
        lambda tx: lowrank_optax.memory_plan(tx, PARAMS),
        lambda tx: lowrank_optax.accumulate(tx, 2).init(PARAMS),
        lambda tx: lowrank_optax.subspace_value_and_grad(loss, tx)(
            PARAMS, tx.init(PARAMS), jnp.ones((6, 12))
        ),
    ],
    ids=["bind", "projections", "memory_plan", "accumulate", "subspace gradients"],
)
def test_two_that_project_the_same_leaf_are_refused_by_name(look):
    message = r"\['b'\]: two low-rank transformations project it; .* optax.partition"
    optimizer = optax.chain(
        optax.masked(_first(), {"a": True, "b": True, "bias": False}),
        optax.masked(_second(), {"a": False, "b": True, "bias": False}),
    )
    with pytest.raises(ValueError, match=message):
        look(optimizer)


def test_a_state_of_another_optimizer_is_refused():
    one, other = OPTIMIZERS["masked"](), lowrank_optax.scale_by_galore(3)
    gradient = lowrank_optax.subspace_value_and_grad(loss, one)
    with pytest.raises(ValueError, match="was the state made by this optimizer"):
        gradient(PARAMS, other.init(PARAMS), jnp.ones((6, 12)))
