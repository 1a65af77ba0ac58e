"""Products with projected parameters: precisions, shardings, and no full gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers, subspace_value_and_grad
from lowrank_optax.binding.optimizer import bind
from tests.suite import random_like
from tests.test_uses import assert_projected, low_rank, squares

pytestmark = pytest.mark.usefixtures("fast_compilation")


def equations(jaxpr):
    """Yields every equation of a program, those of its parts too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params,
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from equations(value)


def products(function, params, *args, optimizer=None):
    """Shapes and precisions of all products of the subspace gradient."""
    optimizer = optimizer or low_rank(2)
    gradient = subspace_value_and_grad(function, optimizer)
    # What nobody needs is not counted.
    program = jax.make_jaxpr(gradient)(params, optimizer.init(params), *args)
    return [
        (equation.outvars[0].aval.shape, equation.params["precision"])
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    ]


ON_THE_LEFT = (((0,), (1,)), ((), ()))
ON_THE_RIGHT = (((1,), (0,)), ((), ()))
PAIR = (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("is_left", [True, False])
@pytest.mark.parametrize(
    "precision", [PAIR, PAIR[::-1], "highest", jax.lax.DotAlgorithmPreset.F32_F32_F32]
)
def test_every_product_has_the_precision_that_jax_gives_it(precision, is_left, side):
    def function(p, x):
        operands = (p["w"], x) if is_left else (x, p["w"])
        numbers = ON_THE_LEFT if is_left else ON_THE_RIGHT
        return squares(jax.lax.dot_general(*operands, numbers, precision=precision))

    params, x = random_like({"w": (16, 8)}), random_like((5, 16), 1)
    found = products(function, params, x, optimizer=low_rank(2, side=side))
    program = jax.make_jaxpr(jax.grad(function))(params, x)
    expected = {
        equation.params["precision"]
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    }
    # The product, one with the basis, one with what is kept; dx is needed by nobody.
    assert len(found) == 3
    assert {precision for _, precision in found} == expected
    assert_projected(low_rank(2, side=side), function, params, x)


def test_a_pair_of_precisions_stays_with_its_operands():
    """Lowered, so that operands are seen: the parameter's precision is the basis's."""

    def function(p, x):
        return squares(jax.lax.dot_general(p["w"], x, ON_THE_LEFT, precision=PAIR))

    params, x = random_like({"w": (16, 8)}), random_like((5, 16), 1)
    optimizer = low_rank(2, side="long")
    gradient = subspace_value_and_grad(function, optimizer)
    lowered = jax.jit(gradient).lower(params, optimizer.init(params), x).as_text()
    found = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(found) == 3
    # W (16, 8) and P (16, 2) to the left of x (5, 16): HIGHEST is theirs.
    for left in ("16x8", "16x2"):
        (line,) = (x for x in found if f"(tensor<{left}xf32>, tensor<5x16xf32>)" in x)
        assert "precision = [HIGHEST, DEFAULT]" in line


# Uses whose full gradient would stand out among the products' sizes.
EXPERTS, KERNEL = (6, 32, 24), (32, 24)
SIZES = {
    "one input": (EXPERTS, lambda p, x: jnp.einsum("td,edf->etf", x, p["w"])),
    "summed": (EXPERTS, lambda p, x: jnp.einsum("td,edf->tf", x, p["w"])),
    "piece": (KERNEL, lambda p, x: x @ p["w"][:, 4:]),
    "scaled": (KERNEL, lambda p, x: x @ (p["w"] * p["s"])),
    "scaled by column": (KERNEL, lambda p, x: x @ (p["w"] / jnp.exp(p["c"]))),
    "fused": (KERNEL, lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1)),
    "added to": (
        KERNEL,
        lambda p, x: x @ (p["w"] + jax.lax.stop_gradient(jnp.sin(p["w"]))),
    ),
    "repeated": (
        KERNEL,
        lambda p, x: jnp.einsum(
            "bd,bdf->bf", x, jnp.broadcast_to(p["w"], (len(x), *KERNEL))
        ),
    ),
    "tied": (KERNEL, lambda p, x: jnp.tanh(p["w"][jnp.array([3, 4])]) @ p["w"].T),
}


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("name", SIZES)
def test_no_product_is_as_large_as_a_full_gradient(name, side):
    shape, function = SIZES[name]
    params = random_like({"w": shape, "s": (), "c": (24,)})
    x = random_like((3, 32), 1)

    def loss(p, x):
        return squares(function(p, x))

    optimizer = low_rank(2, side=side)
    found = products(loss, params, x, optimizer=optimizer)
    assert len(found) >= 3
    assert max(np.prod(size) for size, _ in found) < np.prod(shape)
    assert_projected(optimizer, loss, params, x)


def test_attention_kernels_need_their_dimension_numbers_and_the_error_says_so():
    params = random_like({"w": (8, 6, 9)})
    x = random_like((5, 8), 1)

    def loss(p, x):
        return squares(jnp.einsum("td,dhk->thk", x, p["w"]))

    optimizer = low_rank()
    with pytest.raises(ValueError, match=r"\['w'\] is used by dot_general") as caught:
        subspace_value_and_grad(loss, optimizer)(params, optimizer.init(params), x)
    assert "dimension_numbers" in str(caught.value)
    assert "reduction_axis=0, output_axis=(1, 2)" in str(caught.value)
    numbers = {"w": LowRankDimensionNumbers(0, (1, 2))}
    assert_projected(low_rank(dimension_numbers=numbers), loss, params, x)


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize(
    "numbers",
    [LowRankDimensionNumbers(2, (0, 1, 3)), LowRankDimensionNumbers(2, (1, 3))],
)
def test_fused_query_key_and_value(numbers, side):
    params, x = random_like({"w": (3, 2, 8, 6)}), random_like((2, 5, 8), 1)

    def loss(p, x):
        q, k, v = jnp.einsum("BTD,CKDH->CBTKH", x, p["w"])
        return squares(q * k) + jnp.sum(v**3)

    optimizer = low_rank(dimension_numbers={"w": numbers}, side=side)
    assert_projected(optimizer, loss, params, x)


# Blocks of granularity that are whole heads, parts of one, or neither.
@pytest.mark.parametrize("granularity", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("is_summed", [False, True])
def test_blocks_across_the_axes_of_a_side(granularity, is_summed):
    x = random_like((5, 8), 1)
    heads = random_like((8, 4, 6), 2)

    def loss(p, x):
        if not is_summed:
            return squares(jnp.einsum("td,dhk->thk", x, p["w"]))
        return squares(
            jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, heads), p["w"])
        )

    shape, numbers = (8, 4, 6), LowRankDimensionNumbers(0, (1, 2))
    if is_summed:
        shape, numbers = (4, 6, 8), LowRankDimensionNumbers((0, 1), 2)
    optimizer = low_rank(
        1, side="long", granularity=granularity, dimension_numbers={"w": numbers}
    )
    assert_projected(optimizer, loss, random_like({"w": shape}), x)


def _left(p, x):
    return jax.lax.dot_general(p["w"], x, ON_THE_RIGHT, out_sharding=P(None, "data"))


def _resharded(p, x):
    return x @ jax.sharding.reshard(p["w"], P(None, "model"))


def _features(p, x):
    w = jax.sharding.reshard(p["w"], P("model", None))
    return jax.lax.dot_general(x, w, ON_THE_RIGHT, out_sharding=P("data", None))


def _lookup(p, x):
    ids = jnp.int32(9 * x[:, 0])
    return p["w"].at[ids].get(out_sharding=P("data", "model"))


def _heads(p, x):
    return jnp.einsum("td,dhk->thk", x, p["w"].reshape(16, 4, 6))


def _normalized(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))


ROWS = P("data", None)
# name -> (shape of the kernel, its sharding, that of x, function)
MESHES = {
    "a parameter on the left": ((22, 16), P(None, None), P(None, "data"), _left),
    "resharded": ((16, 24), P("data", "model"), ROWS, _resharded),
    "features on another axis": (
        (16, 24),
        P("data", None),
        P("data", "model"),
        _features,
    ),
    "a lookup": ((32, 24), P(None, "model"), ROWS, _lookup),
    "heads by reshaping": ((16, 24), P(None, "model"), ROWS, _heads),
    "normalized": ((16, 24), P(None, "model"), ROWS, _normalized),
    "experts": (
        (4, 16, 24),
        P("model", None, None),
        ROWS,
        lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]),
    ),
}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("name", MESHES)
def test_explicit_meshes(name, side):
    shape, kernel, rows, function = MESHES[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(random_like(shape), NamedSharding(mesh, kernel))}
        x = jax.device_put(random_like((16, 16), 1), NamedSharding(mesh, rows))
        assert_projected(
            low_rank(side=side), lambda p, x: squares(function(p, x)), params, x
        )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_gradient_inside_of_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = random_like({"w": (16, 24), "b": (24,), "v": (24, 9)})
    x = random_like((16, 16), 1)
    optimizer = low_rank()

    def loss(p, x):
        y = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
        return jnp.mean(y**2) + 0.1 * jnp.sum(p["v"] ** 2)

    _, state = optimizer.update(params, optimizer.init(params), params)
    gradient = subspace_value_and_grad(loss, optimizer)

    def each(params, state, x):
        _, grads, _ = gradient(params, state, x)
        # With types the sum over devices is in the gradient of what they share.
        return jax.tree.map(
            lambda g: g / 8 if check_vma else jax.lax.pmean(g, "data"), grads
        )

    mapped = jax.jit(
        jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    found, (_, expected, _) = mapped(params, state, x), gradient(params, state, x)
    for name in params:
        actual, one = jax.tree.leaves((found[name], expected[name]))
        # Sums in another order, float32.
        np.testing.assert_allclose(actual, one, rtol=1e-4, atol=1e-6)


def test_sums_over_a_batch_of_half_precision_are_in_float32():
    """100,000 ones and a hundredth part more: 1 in bfloat16 has 1 / 128 beside it."""
    params = {"w": jnp.ones((16, 8), jnp.bfloat16)}
    optimizer = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(), 2, basis=lowrank_optax.rademacher()
    )
    gradient = lowrank_optax.subspace_value_and_grad(
        lambda p, x: jnp.sum((x @ p["w"]).astype(jnp.float32)), optimizer
    )
    x = jnp.ones((1001, 16), jnp.bfloat16)
    _, found, state = gradient(params, optimizer.init(params), x)
    (projector,) = bind(optimizer, params).projectors(params, state).values()
    basis = projector.basis(state.subspaces["w"])
    expected = 1001 * jnp.sum(basis.astype(jnp.bfloat16), 0, dtype=jnp.float32)
    expected = jnp.broadcast_to(expected, (16, 2))
    # 1001 itself is no number of bfloat16: it would be 1000.
    actual = found["w"].coordinates
    assert jnp.any(actual != 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=["wide", "tall"])
@pytest.mark.parametrize("side", ["short", "long"])
def test_half_precision_has_as_many_axes_as_its_batches(shape, side):
    """XLA's CPU backend has not every product of them into float32."""
    params = random_like({"w": shape, "v": (3, *shape)})
    x = random_like({"x": (3, 2, 5, shape[0])}, 1)["x"].astype(jnp.bfloat16)

    def function(params, x):
        one = x @ params["w"].astype(jnp.bfloat16)
        own = jnp.einsum("ebti,eio->ebto", x, params["v"].astype(jnp.bfloat16))
        return sum(jnp.mean(jnp.sin(y.astype(jnp.float32)) ** 2) for y in (one, own))

    for granularity in (1, 2):
        optimizer = low_rank(2, side=side, granularity=granularity)
        # 8 bits of precision in each product.
        assert_projected(optimizer, function, params, x, rounding=2e-2)
