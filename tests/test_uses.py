"""Uses of projected parameters: each against the full gradient times the basis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import subspace_value_and_grad
from lowrank_optax.projected import is_projected
from tests.sketched import assert_sketched
from tests.suite import random_like, with_bases

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOKENS, N, M, STACK = 5, 8, 12, 4
# Sums in another order, float32.
ROUNDING = 1e-5


def low_rank(rank=3, **options):
    return lowrank_optax.scale_by_low_rank(optax.identity(), rank, **options)


X = random_like((TOKENS, N), seed=1)


def projected(gradient, basis, view):
    """G P (*stack, a*c, r) in float64, by the axes that the view names."""
    order = view.stack_axes + view.kept_axes + view.projected_axes
    basis = np.asarray(basis, np.float64)
    moved = np.asarray(gradient, np.float64).transpose(order)
    matrices = moved.reshape(*view.stack, view.kept_size, view.projected_size)
    return np.einsum("...ab,...br->...ar", matrices, basis)


def assert_projected(optimizer, function, params, *args, rounding=ROUNDING):
    """Asserts value and gradients; returns how the gradient is called."""
    value, full = jax.jit(jax.value_and_grad(function))(params, *args)
    # Bases of something else, for a gradient may lie in a small space.
    state = with_bases(optimizer.init(params))
    gradient = subspace_value_and_grad(function, optimizer)
    found, grads, _, sketches = jax.jit(gradient.sketching())(params, state, *args)
    np.testing.assert_allclose(found, value, rtol=rounding)
    plans = lowrank_optax.projections(optimizer, params)
    bases = lowrank_optax.subspaces(state)
    actual = jax.tree.leaves(grads, is_leaf=is_projected)
    for (path, expected), kind in zip(
        jax.tree.leaves_with_path(full), actual, strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert is_projected(kind) == plans[name].is_projected, name
        if is_projected(kind):
            basis = lowrank_optax.decode(bases[name].basis)
            expected = projected(expected, basis, plans[name].view)
            kind = kind.coordinates
        assert kind.shape == expected.shape, name
        error = np.linalg.norm(kind - expected)
        assert error <= rounding * np.linalg.norm(expected), name
    assert any(plan.is_projected for plan in plans.values())
    assert_sketched(optimizer, params, full, state, sketches, rounding)
    return functools.partial(gradient, params, state, *args)


def squares(y):
    return jnp.sum(jnp.sin(y) ** 2)


def layered(get):
    def function(p, x):
        for i in range(STACK):
            x = jnp.tanh(x @ get(p["w"], i))
        return squares(x)

    return function


def _first_and_rest(p, x):
    x = jnp.tanh(x @ p["w"][0])
    return squares(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][1:])[0])


def _in_groups(p, x):
    def body(x, pair):
        return jnp.tanh(jnp.tanh(x @ pair[0]) @ pair[1]), None

    groups = p["w"].reshape(2, STACK // 2, N, N)
    return squares(jax.lax.scan(body, x, groups)[0])


def _scanned(make):
    def function(p, x):
        return squares(
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, make(p))[0]
        )

    return function


def _norms(p, x):
    return sum(
        jnp.sum(f(p["w"])) for f in (jnp.square, jnp.abs, jnp.tanh, lambda w: w**3)
    ) * jnp.mean(x @ p["w"])


SQUARE, WIDE, TALL = {"w": (N, N)}, {"w": (N, M)}, {"w": (M, N)}
LAYERS, EXPERTS = {"w": (STACK, N, N)}, {"w": (STACK, N, M)}
TWO = {"q": (N, M), "k": (N, M)}
UNLIKE = {"q": (N, M), "k": (N, 9), "small": (N, 2)}
SCALED = {"w": (N, M), "s": (), "column": (M,), "row": (N,)}
IDS = jnp.array([[3, 7], [3, 29]])

# name -> (shapes, function of params and x)
USES = {
    # A stack as a free dimension.
    "experts, one input": (
        EXPERTS,
        lambda p, x: squares(jnp.einsum("td,edf->etf", x, p["w"])),
    ),
    "experts, one input, inside": (
        EXPERTS,
        lambda p, x: squares(jnp.einsum("td,edf->tef", x, p["w"])),
    ),
    "experts under vmap": (
        EXPERTS,
        lambda p, x: squares(jax.vmap(lambda w, x: x @ w, (0, None))(p["w"], x)),
    ),
    "experts by broadcasting": (EXPERTS, lambda p, x: squares(x[None] @ p["w"])),
    "experts summed": (
        EXPERTS,
        lambda p, x: squares(jnp.einsum("td,edf->tf", x, jnp.sin(1) * p["w"])),
    ),
    "experts first": (
        EXPERTS,
        lambda p, x: squares(jnp.einsum("edf,td->fte", p["w"], x)),
    ),
    "experts by ragged products": (
        EXPERTS,
        lambda p, x: squares(
            jax.lax.ragged_dot(x, p["w"], jnp.array([2, 0, 1, 2], jnp.int32))
        ),
    ),
    "experts picked for each token": (
        EXPERTS,
        lambda p, x: squares(
            jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([0, 2, 2, 3, 1])])
        ),
    ),
    # Pieces of a stack.
    "lax.index_in_dim": (
        LAYERS,
        layered(lambda w, i: jax.lax.index_in_dim(w, i, keepdims=False)),
    ),
    "lax.slice_in_dim": (
        LAYERS,
        layered(lambda w, i: jax.lax.slice_in_dim(w, i, i + 1)[0]),
    ),
    "jnp.take": (LAYERS, layered(lambda w, i: jnp.take(w, i, 0))),
    "jnp.unstack": (LAYERS, layered(lambda w, i: jnp.unstack(w)[i])),
    "iteration": (LAYERS, lambda p, x: squares(sum(jnp.tanh(x @ w) for w in p["w"]))),
    "jnp.split of a stack": (LAYERS, layered(lambda w, i: jnp.split(w, STACK)[i][0])),
    "every second layer, from the end": (
        LAYERS,
        _scanned(lambda p: jnp.flip(p["w"], 0)[::2]),
    ),
    "first layer apart, others scanned": (LAYERS, _first_and_rest),
    "layers scanned in groups": (LAYERS, _in_groups),
    # Pieces of a matrix.
    "columns": (WIDE, lambda p, x: squares(x @ p["w"][:, 2:7])),
    "rows": (TALL, lambda p, x: squares(x[:, :5] @ p["w"][3:8])),
    "jnp.split of a fused kernel": (
        {"w": (N, 3 * M)},
        lambda p, x: squares(
            sum((i + 1) * (x @ w) for i, w in enumerate(jnp.split(p["w"], 3, 1)))
        ),
    ),
    "a fused kernel by reshaping": (
        {"w": (N, 3 * M)},
        lambda p, x: squares(
            (x @ p["w"].reshape(N, 3, M)[:, 1]) * (x @ p["w"].reshape(N, 3, M)[:, 2])
        ),
    ),
    "a traced piece": (
        WIDE,
        lambda p, x: squares(
            x @ jax.lax.dynamic_slice_in_dim(p["w"], jnp.int32(x[0, 0] > 9) + 3, 4, 1)
        ),
    ),
    "one row, as an array": (WIDE, lambda p, x: squares(jnp.tanh(p["w"][3]) * x[0, 0])),
    "padded": (
        WIDE,
        lambda p, x: squares(
            jnp.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
            @ jnp.pad(p["w"], ((0, 1), (3, 0)))
        ),
    ),
    "padded by a trained number": (
        {**WIDE, "bias": (1,)},
        lambda p, x: squares(
            x @ jnp.pad(p["w"], ((0, 0), (3, 0)), constant_values=p["bias"][0])
        ),
    ),
    # Put together.
    "fused by concatenate": (
        TWO,
        lambda p, x: squares(x @ jnp.concatenate([p["q"], p["k"]], 1)),
    ),
    "fused by concatenate, unlike ones": (
        UNLIKE,
        lambda p, x: squares(
            x @ jnp.concatenate([p["q"], p["small"], p["k"], jnp.ones((N, 1))], 1)
        ),
    ),
    "concatenated over what is summed": (
        TWO,
        lambda p, x: squares(
            jnp.concatenate([x, x**2], 1) @ jnp.concatenate([p["q"], p["k"]])
        ),
    ),
    "layers stacked inside": (
        {"q": (N, N), "k": (N, N)},
        _scanned(lambda p: jnp.stack([p["q"], p["k"]])),
    ),
    "layers stacked inside, one constant": (
        {"q": (N, N)},
        _scanned(lambda p: jnp.stack([p["q"], jnp.eye(N)])),
    ),
    # Scaled and added to.
    "scaled by a constant": (WIDE, lambda p, x: squares(x @ (p["w"] * 0.5))),
    "scaled by a traced number": (WIDE, lambda p, x: squares(x @ (x[0, 0] * p["w"]))),
    "divided by a traced number": (WIDE, lambda p, x: squares(x @ (p["w"] / x[0, 0]))),
    "scaled by parameters": (
        SCALED,
        lambda p, x: squares(
            x @ (p["w"] * p["s"] / jnp.exp(p["column"]) * p["row"][:, None])
        ),
    ),
    "scaled twice by parameters": (
        SCALED,
        lambda p, x: squares(
            x @ (p["column"] * p["w"] * jnp.exp(p["s"]) / p["row"][:, None])
        ),
    ),
    "scaled and divided by its own norm": (
        SCALED,
        lambda p, x: squares(
            x @ (p["column"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))
        ),
    ),
    "centred and divided by its own deviation": (
        WIDE,
        lambda p, x: squares(
            x @ ((p["w"] - jnp.mean(p["w"], 0)) / (0.1 + jnp.std(p["w"], 0)))
        ),
    ),
    "divided by its own norm": (
        WIDE,
        lambda p, x: squares(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))),
    ),
    "divided by the norm of its rows": (
        WIDE,
        lambda p, x: squares(
            x @ (p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True))
        ),
    ),
    "centred": (WIDE, lambda p, x: squares(x @ (p["w"] - jnp.mean(p["w"], 0)))),
    "with a constant added": (WIDE, lambda p, x: squares(x @ (0.1 - p["w"]))),
    "with a low-rank array added": (
        {"w": (N, M), "a": (N, 1), "b": (1, M)},
        lambda p, x: squares(x @ (p["w"] + p["a"] @ p["b"])),
    ),
    "differences of parameters": (TWO, lambda p, x: squares(x @ (-p["q"] - p["k"]))),
    "quantized straight through": (
        WIDE,
        lambda p, x: squares(
            x @ (p["w"] + jax.lax.stop_gradient(jnp.round(4 * p["w"]) / 4 - p["w"]))
        ),
    ),
    "repeated over the batch": (
        WIDE,
        lambda p, x: squares(
            jnp.einsum("bij,bjk->bik", x[:, None], jnp.broadcast_to(p["w"], (5, N, M)))
        ),
    ),
    "several kernels in a row": (
        {"q": (N, M), "k": (M, N)},
        lambda p, x: squares(x @ (p["q"] @ p["k"])),
    ),
    "with itself": (WIDE, lambda p, x: squares(p["w"].T @ p["w"]) * squares(x)),
    "behind a barrier": (
        WIDE,
        lambda p, x: squares(x @ jax.lax.optimization_barrier(p["w"])),
    ),
    # Of which there is no gradient, or one at full size in any case.
    "stopped": (
        WIDE,
        lambda p, x: squares(x @ p["w"] - x @ jnp.sin(jax.lax.stop_gradient(p["w"]))),
    ),
    "as a condition": (
        WIDE,
        lambda p, x: squares(x @ p["w"]) * jnp.where(jnp.any(p["w"] > 9), 0.0, 2.0),
    ),
    "L2 penalty": (
        WIDE,
        lambda p, x: squares(x @ p["w"]) + 0.1 * jnp.sum(p["w"] ** 2),
    ),
    "penalty on a difference": (
        WIDE,
        lambda p, x: squares(x @ p["w"]) + jnp.sum((p["w"] - 0.1) ** 2),
    ),
    "norm, and clipping by it": (
        WIDE,
        lambda p, x: squares(x @ p["w"]) / jnp.maximum(1, optax.tree.norm(p)),
    ),
    "inner product with itself": (
        WIDE,
        lambda p, x: jnp.vdot(p["w"], p["w"]) * x[0, 0],
    ),
    "penalties of other kinds": (WIDE, _norms),
    "penalty in a loop and in a remat": (
        WIDE,
        lambda p, x: jax.lax.fori_loop(
            0, 3, lambda i, s: jax.checkpoint(jnp.linalg.norm)(p["w"]) * s + 1, x[0, 0]
        ),
    ),
    # Lookups.
    "an embedding by a scalar under vmap": (
        {"w": (30, N)},
        lambda p, x: squares(
            jax.vmap(jax.vmap(lambda i: p["w"][i]))(IDS) + x[:4].reshape(2, 2, N)
        ),
    ),
    "an embedding scaled, and positions added": (
        {"w": (30, N), "positions": (9, N)},
        lambda p, x: squares(p["w"][IDS] * math.sqrt(N) + p["positions"][:2]),
    ),
    "positions added in a batch": (
        {"positions": (9, N)},
        lambda p, x: squares(
            jnp.sin(x[None] * jnp.ones((3, 1, 1)) + p["positions"][:5])
        ),
    ),
    "tables of a stack, rows of each": (
        {"w": (STACK, 30, N)},
        lambda p, x: squares(jnp.tanh(p["w"][:, IDS[0]]) @ x.T),
    ),
    "tables of a stack, columns of each": (
        {"w": (STACK, 30, N)},
        lambda p, x: squares(x[:, :3] @ jnp.tanh(p["w"][..., jnp.array([1, 5, 1])]).mT),
    ),
    "an embedding, some outside": (
        {"w": (30, N)},
        lambda p, x: squares(
            p["w"].at[jnp.array([1, 40, -1])].get(mode="fill", fill_value=0)
        ),
    ),
    "a stack of one, picked from inside and outside": (
        {"w": (1, N, M)},
        lambda p, x: squares(
            jnp.einsum(
                "td,edf->tef",
                x,
                p["w"].at[jnp.array([0, 1, 2])].get(mode="fill", fill_value=1),
            )
        ),
    ),
}


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("name", USES)
def test_uses(name, side):
    shapes, function = USES[name]
    assert_projected(low_rank(side=side), function, random_like(shapes), X)


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize(
    "name",
    [
        "fused by concatenate",
        "scaled by parameters",
        "L2 penalty",
        "experts, one input",
        "layers scanned in groups",
        "first layer apart, others scanned",
        "an embedding by a scalar under vmap",
    ],
)
def test_uses_at_granularity(name, granularity, side):
    shapes, function = USES[name]
    optimizer = low_rank(1, side=side, granularity=granularity)
    if side == "long" and name.startswith("an embedding"):
        # A row lies in a block, and its place in it: two indices.
        with pytest.raises(
            ValueError, match=r"\['w'\] is used by gather, picking along"
        ):
            assert_projected(optimizer, function, random_like(shapes), X)
        return
    assert_projected(optimizer, function, random_like(shapes), X)
