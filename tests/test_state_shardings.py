"""``state_shardings``: what jit is told is what init makes of sharded parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import state_shardings
from tests.suite import gradients

pytestmark = [
    pytest.mark.usefixtures("fast_compilation"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices"),
]

RANK = 4
SHAPES = {"w": (64, 48), "wide": (48, 64), "stack": (4, 16, 24), "b": (48,), "s": ()}
SPECS = {
    "w": P("x", "y"),
    "wide": P(None, "x"),
    "stack": P("x", None, "y"),
    "b": P("y"),
    "s": P(),
}


def galore() -> optax.GradientTransformationExtraArgs:
    return lowrank_optax.galore(0.1, RANK)


OPTIMIZERS = {
    "galore": galore,
    "adarankgrad": lambda: lowrank_optax.adarankgrad(0.1, RANK),
    "projfactor": lambda: lowrank_optax.projfactor(0.1, RANK, 2),
    "fira": lambda: lowrank_optax.fira(0.1, RANK),
    "low_rank_muon": lambda: lowrank_optax.low_rank_muon(0.1, RANK),
    "low_bit": lambda: lowrank_optax.low_bit(galore(), 8, 8, min_size=1, block=16),
    "accumulate": lambda: lowrank_optax.accumulate(galore(), 2),
    "MultiSteps": lambda: optax.MultiSteps(galore(), 2),
    "adamw": lambda: optax.adamw(0.1),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_modes = pytest.mark.parametrize(
    "mode", [AxisType.Auto, AxisType.Explicit], ids=lambda mode: mode.name.lower()
)


def mesh_for(mode: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(mode,) * 2)


def sharded(mesh: Mesh) -> dict[str, jax.Array]:
    return {
        name: jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, spec))
        for (name, shape), spec in zip(SHAPES.items(), SPECS.values(), strict=True)
    }


def shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_sharded(state: Any, shardings: Any) -> None:
    def check(path, array, sharding):
        same = array.sharding.is_equivalent_to(sharding, array.ndim)
        # A scalar of an automatic mesh lies anywhere until it is used.
        assert same or array.ndim == 0, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, state, shardings)


def test_they_are_those_of_the_axes_that_an_array_is_made_of():
    found = state_shardings(galore(), sharded(mesh_for()))[0]
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), found)
    bases = {k: specs.subspaces[k].basis for k in ("w", "wide", "stack")}
    # The short side is projected: columns, rows, rows.
    assert bases == {"w": ("y", None), "wide": (None, None), "stack": ("x", None, None)}
    moments = {"w": ("x", None), "wide": ("x", None), "stack": ("x", "y", None)}
    for moment in (specs.inner_state.mu, specs.inner_state.nu):
        assert moment == {**moments, "b": ("y",), "s": ()}
    assert specs.subspaces["stack"].rank == ("x",)
    assert specs.count == specs.subspaces["w"].age == ()


@both_modes
@every_optimizer
def test_init_of_sharded_parameters_gives_them_and_so_does_jit_that_is_told(name, mode):
    optimizer, mesh = OPTIMIZERS[name](), mesh_for(mode)
    with jax.set_mesh(mesh):
        params = sharded(mesh)
        shardings = state_shardings(optimizer, params)
        state = optimizer.init(params)
        assert_sharded(state, shardings)
        assert state_shardings(optimizer, shapes(params)) == shardings
        told = jax.jit(optimizer.init, out_shardings=shardings)(params)
        assert jax.tree.map(lambda x: x.sharding, told) == shardings
        jax.tree.map(np.testing.assert_array_equal, told, state)


def test_names_in_boxes_count_as_shardings_on_the_mesh_that_is_given():
    mesh = mesh_for()
    params = sharded(mesh)
    expected = state_shardings(galore(), params)
    arrays = {k: jnp.ones(shape) for k, shape in SHAPES.items()}
    boxed = {k: nn.Partitioned(x, tuple(SPECS[k])) for k, x in arrays.items()}
    found = state_shardings(galore(), boxed, mesh)
    assert nn.unbox(found) == expected
    init = jax.jit(galore().init, out_shardings=found)
    assert_sharded(nn.unbox(init(boxed)), expected)
    named = {
        k: nnx.Param(x, out_sharding=tuple(SPECS[k]), eager_sharding=False)
        for k, x in arrays.items()
    }
    found = state_shardings(galore(), nnx.State(named), mesh)
    specs = [x.spec for x in jax.tree.leaves(found)]
    assert specs == [x.spec for x in jax.tree.leaves(expected)]


def test_merged_axes_are_partitioned_as_the_outermost_that_is():
    """Of the rows of the convolution the inner axis is."""
    mesh = mesh_for()
    specs = {"conv": P(None, "x", "y"), "query": P(None, "x", "y")}
    params = {
        "conv": jax.ShapeDtypeStruct((3, 32, 24), "float32"),
        "query": jax.ShapeDtypeStruct((32, 4, 6), "float32"),
    }
    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        params,
        specs,
    )
    numbers = {
        "conv": lowrank_optax.LowRankDimensionNumbers((0, 1), 2),
        "query": lowrank_optax.LowRankDimensionNumbers(0, (1, 2)),
    }
    optimizer = lowrank_optax.galore(0.1, RANK, dimension_numbers=numbers)
    found = state_shardings(optimizer, params)[0]
    assert found.inner_state.mu["conv"].spec == P("x", None)
    assert found.subspaces["conv"].basis.spec == P("y", None)
    assert found.inner_state.mu["query"].spec == P(None, None)
    # Of the heads, and of their width.
    assert found.subspaces["query"].basis.spec == P("x", None)


def test_a_leaf_without_a_sharding_is_replicated():
    mesh = mesh_for()
    params = {
        "w": sharded(mesh)["w"],
        "plain": jax.ShapeDtypeStruct((32, 16), "float32"),
    }
    found = state_shardings(galore(), params)[0]
    assert found.subspaces["plain"].basis.is_fully_replicated
    assert found.inner_state.mu["plain"] == NamedSharding(mesh, P(None, None))


def test_a_train_state_is_made_sharded_and_stays_so():
    mesh, optimizer = mesh_for(), galore()
    params = sharded(mesh)

    def create(params):
        return TrainState.create(apply_fn=None, params=params, tx=optimizer)

    shardings = jax.eval_shape(create, params).replace(
        step=NamedSharding(mesh, P()),
        params=jax.tree.map(lambda x: x.sharding, params),
        opt_state=state_shardings(optimizer, params),
    )
    state = jax.jit(create, out_shardings=shardings)(params)
    step = jax.jit(
        lambda state, grads: state.apply_gradients(grads=grads),
        out_shardings=shardings,
    )
    state = step(state, gradients(params, 0))
    assert_sharded(state.opt_state, shardings.opt_state)
    alone = jax.tree.map(jnp.asarray, jax.device_get(params))
    updates, _ = optimizer.update(gradients(alone, 0), optimizer.init(alone), alone)
    expected = optax.apply_updates(alone, updates)
    # Sums over devices in another order, enlarged by the division of Adam.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, expected
    )


def test_the_state_of_an_nnx_optimizer_without_names_is_put_where_it_belongs():
    mesh = mesh_for()
    model = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, galore(), wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    specs = {"kernel": P("x", "y"), "bias": P("y")}
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        dict(params),
        specs,
    )
    params = nnx.State(params)
    shardings = state_shardings(optimizer.tx, params)
    state = jax.device_put(nnx.as_pure(optimizer.opt_state), shardings)
    nnx.update(optimizer.opt_state, nnx.state(state))
    assert_sharded(nnx.as_pure(optimizer.opt_state), shardings)
    basis = optimizer.opt_state[0].subspaces["kernel"].basis
    assert basis.sharding.spec == P("y", None)


def _two_meshes() -> dict[str, jax.Array]:
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.ones((64, 48)), NamedSharding(other, P("x")))
    return {**sharded(mesh_for()), "other": w}


@pytest.mark.parametrize(
    ("params", "mesh", "error", "message"),
    [
        (lambda: {"w": jnp.ones((64, 48))}, False, ValueError, "lie on 0 meshes"),
        (_two_meshes, False, ValueError, "lie on 2 meshes"),
        (lambda: SPECS, True, TypeError, r"\['b'\] is P\('y'.*no shape"),
        (
            lambda: {"w": nn.Partitioned(jnp.ones((64, 48)), ("embed", None))},
            True,
            ValueError,
            r"\['w'\]: 'embed' is no axis of the mesh, which has 'x', 'y'",
        ),
    ],
)
def test_what_does_not_say_a_sharding_is_refused(params, mesh, error, message):
    with pytest.raises(error, match=message):
        state_shardings(galore(), params(), mesh_for() if mesh else None)


@pytest.mark.parametrize("name", ["galore", "projfactor"])
def test_map_params_with_partitions_refuses_a_subspace_unless_it_counts_as_a_leaf(name):
    """One partition does not say where several arrays go; these functions do."""
    optimizer = OPTIMIZERS[name]()
    state = optimizer.init({k: jnp.ones(SHAPES[k]) for k in ("w", "b")})
    specs = {k: SPECS[k] for k in ("w", "b")}

    def marked(is_leaf):
        return optax.tree.map_params(
            optimizer,
            lambda leaf, spec: (type(leaf).__name__, spec),
            state,
            specs,
            transform_non_params=lambda leaf: P(),
            is_leaf=is_leaf,
        )

    # The second is in the words of jax 0.10.0.
    words = r"pytree structure error|Expected named tuple, got P\("
    with pytest.raises(ValueError, match=words):
        marked(None)
    leaves = lowrank_optax.Subspace, optax.MaskedNode
    found = marked(lambda node: isinstance(node, leaves))
    assert found[0].subspaces == {
        "w": ("Subspace", SPECS["w"]),
        "b": ("MaskedNode", SPECS["b"]),
    }


def test_blocks_of_a_basis_are_whole_on_every_device():
    """At a granularity of 2 each device has b / 2 rows; the mesh would divide them."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jnp.zeros((64, 32)), NamedSharding(mesh, P(None, "x")))
    for granularity, rows in ((1, 32 // 4), (2, 16)):
        optimizer = lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(), 4, granularity=granularity
        )
        basis = optimizer.init({"w": w}).subspaces["w"].basis
        assert basis.sharding.shard_shape(basis.shape) == (rows, 4)
