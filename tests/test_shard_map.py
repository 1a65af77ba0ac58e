"""Inside ``jax.shard_map``, whose types say what differs from device to device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_optax

pytestmark = [
    pytest.mark.usefixtures("fast_compilation"),
    pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 simulated devices"),
]

RANK, TOKENS, WIDTH, LAYERS, OUTPUTS = 4, 40, 12, 3, 20


def mesh_of_two() -> jax.sharding.Mesh:
    devices = jax.devices()[:2]
    return jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=devices)


def parameters() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (TOKENS, WIDTH),
        "layers": (LAYERS, WIDTH, WIDTH),
        "head": (WIDTH, OUTPUTS),
        "bias": (OUTPUTS,),
    }
    return {
        name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
        for name, shape in shapes.items()
    }


def loss(params, ids):
    """With a lookup, a scan, a checkpoint and a condition."""
    body = jax.checkpoint(lambda h, kernel: (jnp.tanh(h @ kernel), None))
    hidden, _ = jax.lax.scan(body, params["embedding"][ids], params["layers"])
    head = params["head"]
    logits = jax.lax.cond(
        jnp.sum(ids) >= 0, lambda h: h @ head, lambda h: 2 * (h @ head), hidden
    )
    return jnp.mean((logits + params["bias"] - 1) ** 2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_subspace_gradients_of_a_batch_over_devices_are_the_full_ones_projected(
    check_vma,
):
    params, ids = parameters(), jnp.arange(4 * 6).reshape(4, 6)
    optimizer = lowrank_optax.galore(0.1, RANK)
    gradient = lowrank_optax.subspace_value_and_grad(loss, optimizer)
    full = jax.jit(jax.grad(loss))(params, ids)
    _, state = optimizer.update(full, optimizer.init(params), params)

    def on_device(params, state, ids):
        _, found, _ = gradient(params, state, ids)
        # With types of what varies, gradients of replicated leaves are sums already.
        sums = found if check_vma else jax.lax.psum(found, "data")
        return jax.tree.map(lambda x: x / 2, sums)

    found = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh_of_two(),
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )(params, state, ids)
    bases = {
        name: np.asarray(slot.basis, np.float64)
        for name, slot in state[0].subspaces.items()
        if name != "bias"
    }
    wide = {name: np.asarray(x, np.float64) for name, x in full.items()}
    wide["head"] = wide["head"].T  # Its rows are projected, the columns of others.
    for name, basis in bases.items():
        # float32 sums over 24 tokens in another order.
        np.testing.assert_allclose(
            found[name].coordinates, wide[name] @ basis, rtol=1e-4, atol=1e-6
        )
    np.testing.assert_allclose(found["bias"], wide["bias"], rtol=1e-5)


OPTIMIZERS = {
    "galore": lambda: lowrank_optax.galore(0.1, RANK, update_proj_gap=2),
    "adarankgrad": lambda: lowrank_optax.adarankgrad(
        0.1,
        lowrank_optax.energy_rank(RANK, 0.3),
        refresh=lowrank_optax.on_convergence(1, 2),
    ),
    "projfactor": lambda: lowrank_optax.projfactor(
        0.1, RANK, 2, refresh=lowrank_optax.every(2)
    ),
    "low_rank_muon": lambda: lowrank_optax.low_rank_muon(0.1, RANK),
    "fira": lambda: lowrank_optax.fira(0.1, RANK),
    "accumulate": lambda: lowrank_optax.accumulate(lowrank_optax.galore(0.1, RANK), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_device_trains_a_matrix_of_its_own_beside_one_that_all_have(name):
    optimizer, rng = OPTIMIZERS[name](), np.random.default_rng(0)
    # Two alike in shape and name, so that one loop would renew both bases.
    own, common = (jnp.asarray(rng.normal(size=(2, 24, 16)), jnp.float32),) * 2
    grads = jnp.asarray(rng.normal(size=(4, 2, 24, 16)), jnp.float32)

    def trained(own, common, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w1": own, "w2": common}
        grads = {"w1": grads[0], "w2": grads[1]}
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), grads)
        return params

    def on_device(own, common, own_grads, common_grads):
        return trained(own[0], common[0], (own_grads[:, 0], common_grads[:, 0]))

    actual = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh_of_two(),
            in_specs=(P("data"), P(), P(None, "data"), P()),
            out_specs={"w1": P("data"), "w2": P()},
        )
    )(own, common, grads, grads)
    for device in range(2):
        expected = jax.jit(trained)(
            own[device], common[0], (grads[:, device], grads[:, 0])
        )
        mine = actual["w1"].reshape(own.shape)[device]
        # Another program: float32 rounding of weights of about 1.
        np.testing.assert_allclose(mine, expected["w1"], atol=1e-4)
        np.testing.assert_allclose(actual["w2"], expected["w2"], atol=1e-4)
