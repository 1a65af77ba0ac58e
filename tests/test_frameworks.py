"""Parameters in the containers of the frameworks: the same leaves, the same updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_optax
from tests.suite import nnx_trained_beside, run, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

LAYERS, WIDTH, HIDDEN, OUTPUTS, RANK = 3, 6, 10, 5, 4


def galore():
    """Draws nothing at random: a draw depends on the leaf's path, and so on names."""
    return lowrank_optax.galore(0.03, RANK, update_proj_gap=3)


def adarankgrad():
    refresh = lowrank_optax.on_convergence(2, 3)
    return lowrank_optax.adarankgrad(0.03, RANK, refresh=refresh)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Scanned(nnx.Module):
    """A scanned stack of blocks, and a head with a bias."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stack(rngs):
            return Block(rngs)

        self.blocks = stack(rngs)
        self.head = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return block(x)

        return self.head(through(x, self.blocks))


class LinenLayer(nn.Module):
    """A dense layer whose kernel is boxed with the names of its axes."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(OUTPUTS, kernel_init=init)(nn.Dense(WIDTH)(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """As Equinox's: a pytree whose absent bias is None."""

    weight: jax.Array
    bias: jax.Array | None
    activation: str = dataclasses.field(metadata={"static": True})


def nested_dicts() -> Any:
    return {
        "encoder": {"kernel": jnp.ones((WIDTH, OUTPUTS)), "bias": jnp.ones(OUTPUTS)},
        "scan": {"kernel": jnp.ones((LAYERS, WIDTH, HIDDEN))},
        "scale": jnp.ones(()),
    }


def dataclasses_with_none() -> Any:
    return (
        Layer(jnp.ones((OUTPUTS, WIDTH)), None, "relu"),
        [Layer(jnp.ones((WIDTH, HIDDEN)), jnp.ones(WIDTH), "tanh"), None],
    )


def nnx_state() -> Any:
    return nnx.state(Scanned(nnx.Rngs(0)), nnx.Param)


def pure_nnx_state() -> Any:
    return nnx.to_pure_dict(nnx_state())


def linen_params() -> Any:
    return nn.unbox(linen_boxes())


def linen_boxes() -> Any:
    return LinenLayer().init(jax.random.key(0), jnp.ones((1, HIDDEN)))["params"]


def without_boxes(params: Any) -> Any:
    """Returns the same tree of arrays, in which nothing has the names of axes."""
    return nnx.as_pure(nn.unbox(params))


CONTAINERS = {
    "nested dicts": nested_dicts,
    "dataclasses with None": dataclasses_with_none,
    "NNX state": nnx_state,
    "NNX pure dict": pure_nnx_state,
    "Linen": linen_params,
    "Linen boxes": linen_boxes,
}
every_container = pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)


@every_container
def test_updates_are_those_of_a_flat_list_of_the_leaves(make):
    params = make()
    leaves, structure = jax.tree.flatten(params)
    optimizer, steps = galore(), range(7)

    def unflattened(updates, state, params):
        # The same gradients for both, whatever the tree.
        grads = structure.unflatten(updates)
        updates, state = optimizer.update(grads, state, structure.unflatten(params))
        assert jax.tree.structure(updates) == structure
        return jax.tree.leaves(updates), state

    actual, state = run(jax.jit(unflattened), optimizer.init(params), leaves, steps)
    expected, _ = run(jax.jit(optimizer.update), optimizer.init(leaves), leaves, steps)
    # The same program up to the order of its leaves.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        actual,
        expected,
    )
    assert types(state) == types(optimizer.init(params))


@every_container
def test_projections_lists_each_leaf_and_what_becomes_of_it(make):
    params = make()
    plans = lowrank_optax.projections(galore(), params)
    leaves = jax.tree.leaves_with_path(without_boxes(params))
    assert list(plans) == [jax.tree_util.keystr(path) for path, _ in leaves]
    for (_, leaf), plan in zip(leaves, plans.values(), strict=True):
        assert plan.shape == leaf.shape
        assert plan.is_projected == (leaf.ndim > 1)
        assert str(plan).startswith(plan.path)


@every_container
def test_ranks_lists_each_projected_leaf(make):
    params = make()
    plans = lowrank_optax.projections(galore(), params)
    found = lowrank_optax.ranks(galore().init(params))
    assert sorted(found) == sorted(x.path for x in plans.values() if x.is_projected)
    assert all(np.all(rank == RANK) for rank in found.values())


@every_container
def test_adarankgrad_runs_on_the_container(make):
    params = make()
    optimizer = adarankgrad()
    state = jax.eval_shape(optimizer.init, params)
    updates, new_state = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(new_state) == types(state)


@pytest.mark.parametrize("make", [galore, adarankgrad])
def test_nnx_optimizer_makes_the_updates_of_the_optimizer_itself(make):
    for actual, params, state in nnx_trained_beside(make(), Scanned(nnx.Rngs(0)), 7):
        # Another program: float32 rounding of weights of about 1.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
            actual,
            params,
        )
        refreshes = state[0].subspaces["head"]["kernel"].refreshes
    assert np.min(refreshes) >= 3


def test_nnx_split_and_merge_train_to_the_stated_loss():
    model = Scanned(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (32, WIDTH))
    y = jax.random.normal(jax.random.key(2), (32, OUTPUTS))
    graph, params = nnx.split(model)
    optimizer = adarankgrad()

    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, optimizer.init(params)
    for _ in range(100):
        trained, state = step(trained, state)
    assert loss(trained) < 0.1 * loss(params)


def test_linen_boxes_keep_the_names_of_the_parameters_axes():
    params = linen_boxes()
    updates, _ = jax.eval_shape(
        galore().update, params, jax.eval_shape(galore().init, params), params
    )
    assert nn.get_partition_spec(updates) == nn.get_partition_spec(params)
