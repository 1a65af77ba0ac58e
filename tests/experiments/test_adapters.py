"""LoRA, ReLoRA and W = A B: what a matrix counts as, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.model.adapters import has_adapters, merged, restarted, with_adapters
from experiments.model.groups import parameter_groups
from experiments.model.llama import init_params
from experiments.optim.build import build_optimizer
from experiments.optim.options import OptimizerOptions, with_defaults
from tests.experiments.small_runs import MODEL

RANK = 4
KINDS = ("lora", "relora", "low_rank")


@pytest.fixture(scope="module")
def model():
    return init_params(MODEL, jax.random.key(0))


def start(model, kind):
    return with_adapters(model, kind, RANK, jax.random.key(1))


def assert_same(actual, expected, rtol=0.0):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10),
        actual,
        expected,
    )


def test_parameters_without_adapters_are_their_own(model):
    assert not has_adapters(model)
    assert merged(model) is model


@pytest.mark.parametrize("kind", ["lora", "relora"])
def test_lora_starts_as_the_model(model, kind):
    params = start(model, kind)
    assert has_adapters(params)
    assert_same(merged(params), model)
    down = params["adapters"]["blocks.mlp.up"]["down"]
    assert down.shape == (2, 16, RANK)
    # The standard deviation of 128 draws is within a fifth of its own.
    assert float(jnp.std(down)) == pytest.approx(0.25, rel=0.2)


def test_low_rank_starts_as_the_nearest_matrices_of_that_rank(model):
    params = start(model, "low_rank")
    assert isinstance(params["model"]["blocks"]["mlp"]["up"], optax.MaskedNode)
    found = merged(params)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    assert_same(found["embedding"], model["embedding"])
    for layer in range(2):
        whole = np.asarray(model["blocks"]["mlp"]["up"][layer], np.float64)
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        nearest = u[:, :RANK] * s[:RANK] @ v[:RANK]
        actual = found["blocks"]["mlp"]["up"][layer]
        # Float32 of entries of 0.02.
        np.testing.assert_allclose(actual, nearest, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_trained_and_matrices_are_not(model, kind):
    params = start(model, kind)
    options = OptimizerOptions(optimizer=kind, rank=RANK)
    filled = with_defaults(options, steps=10, hidden_size=16)
    options = OptimizerOptions(optimizer=kind, **{"rank": RANK, **filled})
    tx = build_optimizer(options, optax.constant_schedule(1e-2))
    groups = parameter_groups(params)
    adapter = groups["adapters"]["blocks.attention.key"]
    assert adapter == {"down": "blocks", "up": "blocks"}
    assert groups["model"]["embedding"] == "rest"

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * x + 1)) for x in jax.tree.leaves(merged(params)))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    trained = params
    for _ in range(2):
        trained, state = step(trained, state)
    assert_same(trained["model"]["blocks"]["mlp"], params["model"]["blocks"]["mlp"])
    for name, old in params["adapters"].items():
        assert jnp.any(trained["adapters"][name]["up"] != old["up"])
    assert jnp.any(trained["model"]["embedding"] != params["model"]["embedding"])
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim == 3)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(params["adapters"]))


def test_a_restart_keeps_the_model_and_forgets_the_moments(model):
    params = start(model, "relora")
    params["adapters"] = jax.tree.map(lambda x: x + 0.1, params["adapters"])
    state = optax.adam(1e-3).init(params)
    state = jax.tree.map(lambda x: x + 1, state)
    new, new_state = restarted(params, state, jax.random.key(2))
    assert_same(merged(new), merged(params), rtol=1e-6)
    for adapter in new["adapters"].values():
        assert not jnp.any(adapter["up"])
    mu = new_state[0].mu
    assert not any(map(jnp.any, jax.tree.leaves(mu["adapters"])))
    assert all(map(jnp.all, jax.tree.leaves(mu["model"])))
    assert new_state[0].count == 1
