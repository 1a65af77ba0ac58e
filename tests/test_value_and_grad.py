"""Gradients inside subspaces: equal to projected full ones, or a clear refusal."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers, subspace_value_and_grad
from lowrank_optax.matrix.view import matrix_view
from lowrank_optax.projected import is_projected
from tests.sketched import assert_sketched
from tests.suite import random_like, with_bases

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK, TOKENS = 3, 10
# Sums in another order, float32.
ROUNDING = 1e-5


def low_rank(rank=RANK, **options):
    """Momentum in a subspace of every matrix of the tree."""
    return lowrank_optax.scale_by_low_rank(optax.trace(0.9), rank, **options)


def assert_projected(optimizer, function, params, *args, rounding=ROUNDING):
    """Asserts value, gradients and sketches; returns the gradients."""
    grads = jax.jit(jax.grad(function))(params, *args)
    state = with_bases(optimizer.init(params))
    gradient = subspace_value_and_grad(function, optimizer)
    # The same terms as without sketches, which the tests below have.
    value, actual, state, sketches = jax.jit(gradient.sketching())(params, state, *args)
    np.testing.assert_allclose(value, function(params, *args), rtol=rounding)
    plans = lowrank_optax.projections(optimizer, params)
    subspaces = lowrank_optax.subspaces(state)
    assert_sketched(optimizer, params, grads, state, sketches, rounding)
    paths = jax.tree.leaves_with_path(grads)
    kinds = jax.tree.leaves(actual, is_leaf=is_projected)
    for (path, full), kind in zip(paths, kinds, strict=True):
        name, expected, found = jax.tree_util.keystr(path), full, kind
        assert is_projected(kind) == plans[name].is_projected, name
        if plans[name].is_projected:
            found = kind.coordinates
            slot = subspaces[name]
            basis = lowrank_optax.decode(slot.basis)
            expected = plans[name].view.project(full, basis)
        assert found.shape == expected.shape, name
        error = jnp.linalg.norm(found - expected)
        assert error <= rounding * jnp.linalg.norm(expected), name
    assert any(plan.is_projected for plan in plans.values())
    # The optimizer takes them as they are.
    jax.eval_shape(optimizer.update, actual, state, params)
    return actual


def squares(y):
    return jnp.sum(jnp.sin(y) ** 2)


def chain(params, x):
    return squares(jnp.tanh(x @ params["up"]) @ params["down"])


CHAIN = {"up": (8, 20), "down": (20, 6)}


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("granularity", [1, 2])
def test_products_of_tall_and_wide_matrices(side, granularity):
    optimizer = low_rank(2, side=side, granularity=granularity)
    assert_projected(optimizer, chain, random_like(CHAIN), jnp.ones((TOKENS, 8)) / 2)


def _thrice(x):
    return jnp.stack([x, 2 * x, -x])


# (shapes, dimension numbers or None, function of params and x)
HEADS = LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
OUT = LowRankDimensionNumbers(reduction_axis=(0, 1), output_axis=2)
PROGRAMS = {
    "square": ({"w": (8, 8)}, None, lambda p, x: squares(x @ p["w"])),
    "batched tokens": (
        {"w": (8, 12)},
        None,
        lambda p, x: squares(x.reshape(2, 5, 8) @ p["w"]),
    ),
    "transposed": ({"w": (12, 8)}, None, lambda p, x: squares(x @ p["w"].T)),
    "parameter first": ({"w": (12, 8)}, None, lambda p, x: squares(p["w"] @ x.T)),
    "heads": (
        {"w": (8, 3, 4)},
        {"w": HEADS},
        lambda p, x: squares(jnp.einsum("td,dhk->thk", x, p["w"])),
    ),
    "heads, other order": (
        {"w": (8, 3, 4)},
        {"w": HEADS},
        lambda p, x: squares(jnp.einsum("dhk,td->kth", p["w"], x)),
    ),
    "heads summed": (
        {"w": (2, 4, 12)},
        {"w": OUT},
        lambda p, x: squares(jnp.einsum("thk,hkd->td", x.reshape(-1, 2, 4), p["w"])),
    ),
    "heads by reshaping": (
        {"w": (8, 12)},
        None,
        lambda p, x: squares(jnp.einsum("td,dhk->htk", x, p["w"].reshape(8, 3, 4))),
    ),
    "experts": (
        {"w": (3, 8, 12)},
        None,
        lambda p, x: squares(jnp.einsum("etd,edf->etf", _thrice(x), p["w"])),
    ),
    "experts last": (
        {"w": (8, 12, 3)},
        {"w": LowRankDimensionNumbers(0, 1)},
        lambda p, x: squares(jnp.einsum("etd,dfe->tfe", _thrice(x), p["w"])),
    ),
    "layers by index": (
        {"w": (2, 8, 8)},
        None,
        lambda p, x: squares(jnp.tanh(x @ p["w"][0]) @ p["w"][1]),
    ),
    "layer by traced index": (
        {"w": (2, 8, 8)},
        None,
        lambda p, x: squares(
            x @ jax.lax.dynamic_index_in_dim(p["w"], jnp.int32(x[0, 0] > 9), 0, False)
        ),
    ),
    "used twice": (
        {"w": (8, 8)},
        None,
        lambda p, x: squares(jnp.tanh(x @ p["w"]) @ p["w"]) + squares(x @ p["w"].T),
    ),
    "jitted": (
        {"w": (8, 12)},
        None,
        lambda p, x: squares(jax.jit(lambda w: jnp.tanh(x @ w))(p["w"])),
    ),
    "checkpointed": (
        {"w": (8, 12), "b": (12,)},
        None,
        lambda p, x: squares(
            jax.checkpoint(lambda p: jnp.tanh(x @ p["w"] + p["b"]))(p)
        ),
    ),
    "conditional": (
        {"w": (8, 8)},
        None,
        lambda p, x: squares(
            jax.lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: x @ w.T, p["w"])
        ),
    ),
    "vmapped": (
        {"w": (8, 12)},
        None,
        lambda p, x: squares(jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x)),
    ),
    "embedding, tied": (
        {"w": (30, 8)},
        None,
        lambda p, x: squares(
            jnp.tanh(p["w"][jnp.array([[3, 7], [3, 29]])] + x[:4].reshape(2, 2, 8))
            @ p["w"].T
        ),
    ),
    "low precision": (
        {"w": (8, 12)},
        None,
        lambda p, x: squares(
            jax.lax.dot(
                x.astype(jnp.bfloat16),
                p["w"].astype(jnp.bfloat16),
                preferred_element_type=jnp.float32,
            )
        ),
    ),
    "a stack of one": (
        {"w": (1, 8, 12)},
        None,
        lambda p, x: squares(x @ p["w"][0]) + squares(x[None] @ p["w"]),
    ),
}


# Each way to use a parameter, and both sides of those that decide which is which.
BOTH_SIDES = ("square", "transposed", "heads", "heads summed", "experts", "used twice")
CASES = [
    *((name, "short") for name in PROGRAMS),
    *((name, "long") for name in (*BOTH_SIDES, "embedding, tied")),
]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_programs(name, side):
    shapes, numbers, function = PROGRAMS[name]
    optimizer = low_rank(side=side, dimension_numbers=numbers)
    x = random_like({"x": (TOKENS, 8)}, seed=1)["x"]
    # P and the sums are bfloat16 there, 8 bits of precision.
    rounding = 2e-2 if name == "low precision" else ROUNDING
    assert_projected(optimizer, function, random_like(shapes), x, rounding=rounding)


@pytest.mark.parametrize(
    ("remat", "granularity", "basis"),
    [
        (False, 1, "computed"),
        (True, 2, "computed"),
        (False, 2, "random"),
        (True, 1, "random"),
    ],
)
def test_scanned_layers(remat, granularity, basis):
    def layer(x, params):
        return x + jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"], None

    def function(params, x):
        body = jax.checkpoint(layer) if remat else layer
        x, _ = jax.lax.scan(body, x, params["layers"], reverse=True)
        return squares(x @ params["head"])

    layers = {"up": (3, 8, 14), "down": (3, 14, 8), "bias": (3, 14)}
    params = random_like({"layers": layers, "head": (8, 12)})
    x = random_like({"x": (TOKENS, 8)}, seed=1)["x"]
    # By its shape alone the stack of biases is a matrix.
    stack = LowRankDimensionNumbers(1, 2)
    numbers = {
        "head": LowRankDimensionNumbers(0, 1),
        "layers": {"up": stack, "down": stack, "bias": None},
    }
    options = {"granularity": granularity, "dimension_numbers": numbers}
    if basis == "computed":
        assert_projected(low_rank(2, **options), function, params, x)
        return
    gaussian = lowrank_optax.gaussian()
    optimizer = low_rank(2, basis=gaussian, rebase="first", **options)
    gradient = subspace_value_and_grad(function, optimizer)
    assert not gradient.refresh_due(params, optimizer.init(params))
    _, actual, state = jax.jit(gradient)(params, optimizer.init(params), x)
    # The first basis has been drawn, without a gradient.
    refreshes = [slot.refreshes for slot in lowrank_optax.subspaces(state).values()]
    assert all(np.all(count == 1) for count in refreshes)
    # Updating by the projected gradients is updating by the full ones.
    full = jax.grad(function)(params, x)
    expected, after = optimizer.update(full, optimizer.init(params), params)
    updates, state = optimizer.update(actual, state, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        (updates, state),
        (expected, after),
    )


def test_fifty_updates_are_those_of_full_gradients():
    """Refreshes fall on the same updates, decided from the state beforehand."""
    optimizer = optax.chain(
        lowrank_optax.adarankgrad(
            0.02,
            RANK,
            refresh=lowrank_optax.every(7),
            basis=lowrank_optax.range_finder(power_iterations=1),
        ),
    )
    params = random_like(CHAIN)
    x = random_like({"x": (50, TOKENS, 8)}, seed=1)["x"]
    gradient = subspace_value_and_grad(chain, optimizer)

    def step(which):
        def run(params, state, x):
            value, grads, state = which(params, state, x)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return jax.jit(run)

    subspace_step, full_step = step(gradient), step(gradient.full)
    is_due = jax.jit(gradient.refresh_due)
    histories, dues = [], []
    for is_subspace in (True, False):
        trained, state, values = params, optimizer.init(params), []
        for batch in x:
            due = bool(is_due(trained, state))
            run = subspace_step if is_subspace and not due else full_step
            trained, state, value = run(trained, state, batch)
            values.append(value)
            dues.append(due)
        histories.append(values)
    np.testing.assert_allclose(*histories, rtol=2e-4)
    assert dues[:50] == dues[50:]
    assert 8 <= sum(dues[:50]) <= 16


def test_refreshes_are_known_ahead():
    optimizer = low_rank(refresh=lowrank_optax.every(5, stagger=False))
    params = random_like(CHAIN)
    gradient = subspace_value_and_grad(chain, optimizer)
    state = optimizer.init(params)
    assert gradient.refresh_due(params, state)
    _, state = optimizer.update(params, state, params)
    found = [bool(gradient.refresh_due(params, state, ahead)) for ahead in range(6)]
    assert found == [False] * 4 + [True] * 2


def test_being_late_does_no_harm():
    optimizer = low_rank(refresh=lowrank_optax.every(1))
    params, x = random_like(CHAIN), jnp.ones((TOKENS, 8)) / 2
    gradient = subspace_value_and_grad(chain, optimizer)
    _, state = optimizer.update(params, optimizer.init(params), params)
    for _ in range(3):
        _, grads, state = gradient(params, state, x)
        _, state = optimizer.update(grads, state, params)
    ages = [slot.age for slot in lowrank_optax.subspaces(state).values()]
    assert all(age == 4 for age in ages)


@pytest.mark.parametrize("what", ["examples", "members of an ensemble"])
def test_vmap_over_the_gradient_is_the_loop(what):
    params = random_like({"up": (3, 8, 20), "down": (3, 20, 6)})
    xs = random_like({"x": (3, TOKENS, 8)}, seed=1)["x"]
    optimizer = low_rank()
    state = jax.vmap(optimizer.init)(params)
    gradient = subspace_value_and_grad(chain, optimizer)
    if what == "examples":
        params, state = jax.tree.map(lambda x: x[0], (params, state))
    axis = None if what == "examples" else 0
    full = jax.vmap(gradient.full, in_axes=(axis, axis, 0))(params, state, xs)[1]
    if what == "examples":
        full = jax.tree.map(lambda x: x[0], full)
        _, state = optimizer.update(full, state, params)
    else:
        _, state = jax.vmap(optimizer.update)(full, state, params)
    over = jax.jit(jax.vmap(gradient, in_axes=(axis, axis, 0)))
    values, together, _ = over(params, state, xs)
    for i in range(3):
        one = (params, state)
        if axis == 0:
            one = jax.tree.map(lambda x, i=i: x[i], one)
        value, alone, _ = gradient(*one, xs[i])
        np.testing.assert_allclose(values[i], value, rtol=ROUNDING)
        for name, expected in alone.items():
            expected = expected.coordinates
            error = jnp.linalg.norm(together[name].coordinates[i] - expected)
            assert error <= ROUNDING * jnp.linalg.norm(expected), name
            assert jnp.linalg.norm(expected) > 0


def test_aux_keyword_arguments_and_other_leaves():
    def function(params, x, *, scale):
        y = x @ params["w"] * params["gain"]
        return scale * squares(y), {"y": y}

    params = random_like({"w": (8, 12), "gain": (12,)})
    x = random_like({"x": (TOKENS, 8)}, seed=1)["x"]
    optimizer = low_rank()
    _, state = optimizer.update(params, optimizer.init(params), params)
    gradient = subspace_value_and_grad(function, optimizer, has_aux=True)
    (value, aux), grads, _ = jax.jit(gradient)(params, state, x, scale=2.0)
    (expected, _), full = jax.value_and_grad(function, has_aux=True)(
        params, x, scale=2.0
    )
    np.testing.assert_allclose(value, expected, rtol=ROUNDING)
    np.testing.assert_allclose(grads["gain"], full["gain"], rtol=1e-4)
    assert aux["y"].shape == (TOKENS, 12)
    (_, _), whole, same = gradient.full(params, state, x, scale=2.0)
    assert whole["w"].shape == (8, 12)
    assert same is state


def test_frameworks_need_no_change():
    x = random_like({"x": (TOKENS, 8)}, seed=1)["x"]
    model = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(9, use_bias=False)])
    params = model.init(jax.random.key(0), x)
    assert_projected(low_rank(), lambda p, x: squares(model.apply(p, x)), params, x)

    graph, params = nnx.split(
        nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=nnx.Rngs(0)), nnx.Param
    )
    numbers = jax.tree.map(
        lambda leaf: (
            None if leaf.ndim < 3 else (OUT if leaf.shape == (2, 4, 8) else HEADS)
        ),
        nnx.to_pure_dict(params),
    )

    def attend(p, x):
        module = nnx.merge(graph, p)
        return squares(module(x[None]))

    assert_projected(
        low_rank(dimension_numbers=numbers), attend, nnx.to_pure_dict(params), x
    )


UNSUPPORTED = {
    "entry by entry, in a product": (
        lambda p, x: squares(x @ jnp.tanh(p["w"])),
        r"\['w'\] is used entry by entry, by tanh, and then by dot_general, where",
    ),
    "masked entry by entry": (
        lambda p, x: squares(x @ (p["w"] * jnp.eye(8, 12))),
        r"\['w'\] is used entry by entry, by mul, and then by dot_general, where",
    ),
    "beside one that could be used so": (
        lambda p, x: squares(jnp.tanh(p["w"][:5]).T @ p["heads"][0]),
        r"^\['w'\] is used entry by entry, by tanh, and then by dot_general, where",
    ),
    "in a function of a matrix": (
        lambda p, x: squares(x @ jnp.cumsum(p["w"], 0)),
        r"\['w'\] is used by cumsum, where",
    ),
    "a convolution": (
        lambda p, x: (
            squares(jnp.convolve(x[0], p["w"][:, 0]))
            + jax.lax.conv(
                x[None, :8, :8, None], p["w"][:, :8, None, None], (1, 1), "SAME"
            ).sum()
        ),
        r"\['w'\] is used by conv_general_dilated, where",
    ),
    "mixed by a reshape": (
        lambda p, x: squares(x @ p["w"].reshape(12, 8).T),
        r"\['w'\] is used by reshape, across its axes",
    ),
    "carried by a scan": (
        lambda p, x: squares(
            x @ jax.lax.scan(lambda w, _: (-w, None), p["w"], length=2)[0]
        ),
        r"\['w'\] is used by scan, as a carried value",
    ),
    "chosen by a conditional": (
        lambda p, x: squares(
            x @ jax.lax.cond(x[0, 0] > 9, lambda w: w, lambda w: -w, p["w"])
        ),
        r"\['w'\] is used by cond, which returns it",
    ),
    "in a rule of the user's own": (
        lambda p, x: squares(_with_rule(x, p["w"])),
        r"\['w'\] is used by custom_vjp_call, whose derivative rule is its own",
    ),
    "a function of what a number was added to": (
        lambda p, x: squares(x @ jnp.tanh(p["w"] + 1)),
        r"\['w'\] is used entry by entry, by tanh, and then by dot_general, where",
    ),
    "complex numbers": (
        lambda p, x: squares(jnp.abs(x @ jax.lax.complex(p["w"], p["w"]))),
        r"\['w'\] is used by complex, where",
    ),
    "pieces of a merged axis": (
        lambda p, x: squares(p["w"].reshape(96)[5:20]) + squares(x),
        r"\['w'\] is used by slice, cutting an axis that a reshape merged",
    ),
    "other matrices": (
        lambda p, x: squares(jnp.einsum("td,dhk->thk", x, p["heads"])),
        r"\['heads'\] is used by dot_general, .* dimension_numbers",
    ),
    "a mixture of a stack's matrices": (
        lambda p, x: squares(x[:, :5] @ jnp.einsum("shk,s->hk", p["heads"], x[0])),
        r"\['heads'\] is used by dot_general, .* mixes the matrices of a stack",
    ),
    "inside of shard_map": (
        lambda p, x: squares(_mapped(x, p["w"])),
        r"\['w'\] is used by shard_map, where",
    ),
    "beside others that are followed": (
        lambda p, x: squares(
            jax.lax.scan(
                lambda w, _: (w * 2, jnp.sum(x @ p["heads"][:, 0])), p["w"], length=2
            )[0]
        ),
        r"^\['w'\] is used by scan",
    ),
}


def _mapped(x, w):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P())
    return jax.shard_map(jnp.dot, mesh=mesh, in_specs=specs, out_specs=P("data"))(x, w)


@jax.custom_vjp
def _with_rule(x, w):
    return x @ w


_with_rule.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda res, dy: (dy @ res[1].T, res[0].T @ dy)
)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_followed_is_refused_by_name(name):
    function, message = UNSUPPORTED[name]
    params, x = random_like({"w": (8, 12), "heads": (8, 5, 6)}), jnp.ones((TOKENS, 8))
    optimizer = low_rank()
    gradient = subspace_value_and_grad(function, optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        gradient(params, optimizer.init(params), x)
    leaf = "heads" if "heads" in message else "w"
    assert f"full_gradients=(\"['{leaf}']\",)" in str(caught.value)
    # The way out that the error names is one.
    way_out = subspace_value_and_grad(function, optimizer, (), (f"['{leaf}']",))
    _, grads, _ = jax.jit(way_out)(params, optimizer.init(params), x)
    expected = jax.jit(jax.grad(function))(params, x)[leaf]
    error = jnp.linalg.norm(grads[leaf] - expected)
    assert error <= ROUNDING * jnp.linalg.norm(expected)


def _looped(p, x, stopped):
    y = jax.lax.while_loop(
        lambda y: jnp.sum(y) < 9, lambda y: y + x @ p["w"] + 1, 0 * x
    )
    return squares((jax.lax.stop_gradient(y) if stopped else y) + x @ p["w"])


def test_a_loop_without_reverse_mode_may_be_where_no_gradient_goes():
    params, x = random_like({"w": (8, 8)}), jnp.ones((TOKENS, 8)) / 2
    assert_projected(low_rank(), functools.partial(_looped, stopped=True), params, x)
    gradient = subspace_value_and_grad(_looped, low_rank())
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        gradient(params, low_rank().init(params), x, stopped=False)


def test_a_leaf_may_be_left_out():
    def function(params, x):
        return squares(jnp.tanh(x @ jnp.sin(params["w"])) @ params["v"])

    params = random_like({"w": (8, 12), "v": (12, 9)})
    x = jnp.ones((TOKENS, 8)) / 3
    optimizer = low_rank()
    state = optimizer.init(params)
    gradient = subspace_value_and_grad(function, optimizer, full_gradients=("['w']",))
    _, grads, state = gradient(params, state, x)
    assert grads["w"].shape == (8, 12)
    assert grads["v"].coordinates.shape == (12, RANK)
    np.testing.assert_allclose(
        grads["w"], jax.grad(function)(params, x)["w"], rtol=1e-4, atol=1e-6
    )
    optimizer.update(grads, state, params)
    wrong = subspace_value_and_grad(function, optimizer, full_gradients=("['u']",))
    with pytest.raises(ValueError, match=r"full_gradients names \['u'\], which"):
        wrong(params, state, x)


def test_bad_calls_are_refused():
    params, x = random_like(CHAIN), jnp.ones((TOKENS, 8))
    optimizer = low_rank()
    plain = optax.adam(0.1)
    with pytest.raises(ValueError, match="no leaf of these parameters is projected"):
        subspace_value_and_grad(chain, plain)(params, plain.init(params), x)
    with pytest.raises(TypeError, match="must return a scalar"):
        subspace_value_and_grad(lambda p, x: x @ p["up"], optimizer)(
            params, optimizer.init(params), x
        )
    other = optimizer.init(random_like({"up": (9, 20), "down": (20, 6)}))
    with pytest.raises(ValueError, match=r"\['up'\].*does not fit"):
        subspace_value_and_grad(chain, optimizer)(params, other, x)


@pytest.mark.parametrize("wrap", ["low bits", "accumulate"])
def test_other_states(wrap):
    params = random_like(CHAIN)
    x = random_like({"x": (TOKENS, 8)}, seed=1)["x"]
    inner = lowrank_optax.galore(0.1, RANK)
    if wrap == "low bits":
        optimizer = lowrank_optax.low_bit(inner, 8, 4, min_size=1, block=8)
        grads = assert_projected(optimizer, chain, params, x)
        assert grads["up"].coordinates.dtype == jnp.float32
        return
    optimizer = lowrank_optax.accumulate(inner, 2)
    gradient = subspace_value_and_grad(chain, optimizer)
    state = optimizer.init(params)
    for which in (gradient.full, gradient.full):
        _, grads, state = which(params, state, x)
        _, state = optimizer.update(grads, state, params)
    subspace, full = state, state
    for scale in (1.0, 3.0):
        _, grads, subspace = gradient(params, subspace, scale * x)
        subspace = optimizer.add(grads, subspace, scale, params)
        _, grads, full = gradient.full(params, full, scale * x)
        full = optimizer.add(grads, full, scale)
    expected, _ = optimizer.finish(full, params)
    actual, _ = optimizer.finish(subspace, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        actual,
        expected,
    )


WIDE = {"up": (64, 96), "down": (96, 64)}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
def test_data_parallel_training_reduces_the_projected_gradients_only():
    params = random_like(WIDE)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    optimizer = low_rank(4)
    x = jnp.ones((16, 64))
    gradient = subspace_value_and_grad(chain, optimizer)
    state = optimizer.init(params)

    def moved(function):
        compiled = jax.jit(
            function, in_shardings=(whole, whole, cut), out_shardings=whole
        )
        text = compiled.lower(params, state, x).compile().as_text()
        found = re.findall(r"= (.*?) (?:all-reduce|all-gather)(?:-start)?\(", text)
        return sum(
            math.prod(int(n) for n in dims.split(",") if n)
            for line in found
            for dims in re.findall(r"f32\[([0-9,]*)\]", line)
        )

    full = moved(lambda p, s, x: gradient.full(p, s, x)[:2])
    ours = moved(lambda p, s, x: gradient(p, s, x)[:2])
    assert full >= 2 * 64 * 96
    # r of b columns, and the value.
    assert ours <= full * 4 / 64 + 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")])
def test_sharded_parameters(spec):
    params, x = random_like(WIDE), random_like({"x": (16, 64)}, 1)["x"]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), params)
    assert_projected(low_rank(4), chain, sharded, x)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize("shape", [(16, 64), (8, 4, 64)])
def test_data_parallel_training_under_explicit_axes(shape):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = random_like({"x": shape}, 1)["x"]
    with jax.set_mesh(mesh):
        params = jax.device_put(random_like(WIDE), NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        assert_projected(low_rank(4), chain, params, x)


def test_views_agree_with_the_products():
    """A basis of the rows and one of the columns, by the plain formulas."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 6)), rng.normal(size=(6, 4))
    dy = 2 * np.sin(x @ w) * np.cos(x @ w)
    view = matrix_view((6, 4), LowRankDimensionNumbers(0, 1), "long", "w")
    assert view.projects_rows
    params = {"w": jnp.asarray(w, jnp.float32)}
    optimizer = low_rank(2, side="long")
    grads = {"w": jnp.asarray(x.T @ dy, jnp.float32)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    basis = np.asarray(state.subspaces["w"].basis, np.float64)
    gradient = subspace_value_and_grad(lambda p, x: squares(x @ p["w"]), optimizer)
    _, actual, _ = gradient(params, state, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(
        actual["w"].coordinates, ((x @ basis).T @ dy).T, rtol=1e-4, atol=1e-5
    )


def test_a_leaf_of_another_method_may_be_left_out_by_full_gradients():
    params = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8))}
    optimizer = optax.partition(
        {"a": lowrank_optax.galore(1e-2, rank=2), "b": lowrank_optax.fira(1e-2, 2)},
        {"a": "a", "b": "b"},
    )
    state = optimizer.init(params)

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["a"] + x @ params["b"]))

    x = jnp.ones((4, 16))
    with pytest.raises(ValueError, match=r"\['b'\]: this method needs the full"):
        subspace_value_and_grad(loss, optimizer)(params, state, x)
    gradient = subspace_value_and_grad(loss, optimizer, full_gradients=("['b']",))
    _, grads, _ = gradient(params, state, x)
    assert is_projected(grads["a"])
    assert grads["b"].shape == (16, 8)
