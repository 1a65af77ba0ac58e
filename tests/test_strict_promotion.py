"""``jax_numpy_dtype_promotion="strict"``: no dtype is left to a promotion."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax

PARAMS = {"blocks": jnp.ones((2, 64, 16)), "bias": jnp.ones(16)}


def _in_subspace(rank=4, **parts):
    # optax.adam itself does not work so, nor do methods that give it to vectors.
    return lowrank_optax.scale_by_low_rank(optax.trace(0.9), rank=rank, **parts)


def _behind_a_subspace(transformation):
    return optax.chain(_in_subspace(), transformation)


OPTIMIZERS = {
    "plain": _in_subspace(),
    "staggered": _in_subspace(refresh=lowrank_optax.every(3, stagger=True)),
    "on convergence": _in_subspace(refresh=lowrank_optax.on_convergence(2, 4)),
    "energy": _in_subspace(lowrank_optax.energy_rank(8, 0.05, 2)),
    "cosines": _in_subspace(basis=lowrank_optax.dct_columns()),
    "drawn": _in_subspace(basis=lowrank_optax.gaussian()),
    "svd": _in_subspace(basis=lowrank_optax.exact_svd()),
    "power": _in_subspace(basis=lowrank_optax.power_iteration()),
    "granular": _in_subspace(granularity=4),
    "signs": _in_subspace(residual=lowrank_optax.sign_residual()),
    "columns": _in_subspace(residual=lowrank_optax.normalized_residual()),
    "scaled": _in_subspace(residual=lowrank_optax.scaled_residual(decays=(0.9, 0.999))),
    "orthogonalized": _in_subspace(residual=lowrank_optax.orthogonalized_residual()),
    "8 bits": lowrank_optax.low_bit(_in_subspace(), basis_bits=4, min_size=16),
    "neurons": _behind_a_subspace(lowrank_optax.scale_by_neuron()),
    "rounding": _behind_a_subspace(lowrank_optax.stochastic_rounding()),
    "accumulated": lowrank_optax.accumulate(_in_subspace(), 2),
}


def _loss(params, x):
    for kernel in params["blocks"]:
        x = jnp.tanh(x @ kernel + params["bias"]) @ kernel.T
    return jnp.mean(x**2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_free_promotion(name):
    optimizer = OPTIMIZERS[name]

    def after_steps():
        params, state = PARAMS, jax.jit(optimizer.init)(PARAMS)
        for i in range(4):
            x = jax.random.normal(jax.random.key(i), (8, 64))
            gradients = jax.grad(_loss)(params, x)
            updates, state = jax.jit(optimizer.update)(gradients, state, params)
            step = jax.tree.map(lambda u: -0.01 * u, updates)
            params = optax.apply_updates(params, step)
        return params

    free = after_steps()
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"):
        strict = after_steps()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, free, strict))
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, strict, PARAMS))


@pytest.mark.parametrize("gradients", ["subspace", "full"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_needs_no_promotion(gradients, micro_batches):
    optimizer = _behind_a_subspace(optax.scale(-0.01))
    step = lowrank_optax.train_step(
        _loss, optimizer, gradients=gradients, micro_batches=micro_batches
    )
    losses = []
    with jax.numpy_dtype_promotion("strict"):
        params = jax.tree.map(jnp.copy, PARAMS)
        state = step.init(params)
        for _ in range(3):
            params, state, metrics = step(params, state, jnp.ones((8, 64)))
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
