"""What a loss function is called with and returns: as with ``jax.value_and_grad``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax
from lowrank_optax import subspace_value_and_grad

pytestmark = pytest.mark.usefixtures("fast_compilation")

PARAMS = {"w": jnp.arange(96.0).reshape(8, 12) / 96}
X = jnp.arange(40.0).reshape(5, 8) / 40
OPTIMIZER = lowrank_optax.scale_by_low_rank(optax.identity(), 3)
STATE = OPTIMIZER.update(PARAMS, OPTIMIZER.init(PARAMS), PARAMS)[1]


def with_flag(p, x, train, *, deterministic=True):
    y = x @ p["w"]
    y = 2 * y if train else y
    return jnp.mean(y**2) if deterministic else jnp.mean(y)


def with_name(p, x, mode="mean"):
    return getattr(jnp, mode)((x @ p["w"]) ** 2)


def with_mask(p, x, mask):
    y = x @ p["w"]
    return jnp.mean(y if mask is None else y * mask)


def with_sizes(p, x, n, axis):
    y = jnp.zeros((n, 12)) + (x @ p["w"])[:1]
    return jnp.mean(jnp.sum(y, axis=axis) ** 2)


def with_function(p, x, apply, config):
    return jnp.mean(apply(p, x) ** config["power"])


def with_model(p, x, model):
    return jnp.mean(model(x @ p["w"]) ** 2)


def with_key(p, x, key):
    y = x @ p["w"]
    return jnp.mean(jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0) ** 2)


def with_types(p, x, ids):
    # Neither becomes an array, nor another one, on the way.
    assert type(x) is np.ndarray
    assert x.dtype == np.float64
    assert type(ids) is list
    return jnp.mean((x[ids] @ p["w"]) ** 2)


# name -> (function, positional arguments, keyword arguments)
CALLS = {
    "a flag": (with_flag, (X, True), {}),
    "flags by keyword": (with_flag, (), {"x": X, "train": 0, "deterministic": False}),
    "a string": (with_name, (X, "sum"), {}),
    "a string by keyword": (with_name, (X,), {"mode": "max"}),
    "None": (with_mask, (X, None), {}),
    "a shape and an axis": (with_sizes, (X, 3, 1), {}),
    "a function and a dict": (
        with_function,
        (X, lambda p, x: jnp.tanh(x @ p["w"]), {"power": 2}),
        {},
    ),
    "a module": (with_model, (X,), {"model": nnx.Linear(12, 2, rngs=nnx.Rngs(0))}),
    "a typed key": (with_key, (X, jax.random.key(3)), {}),
    "an old key": (with_key, (X, jax.random.PRNGKey(3)), {}),
    "NumPy's arrays and a list": (with_types, (np.asarray(X, np.float64), [0, 2]), {}),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_the_function_as_they_are(name, jitted):
    function, args, kwargs = CALLS[name]

    def call(params, state):
        return subspace_value_and_grad(function, OPTIMIZER)(
            params, state, *args, **kwargs
        )

    value, grads, _ = (jax.jit(call) if jitted else call)(PARAMS, STATE)
    expected, full = jax.value_and_grad(function)(PARAMS, *args, **kwargs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    basis = np.asarray(STATE.subspaces["w"].basis, np.float64)
    # The shorter side, of 8 rows, is projected.
    projected = np.asarray(full["w"], np.float64).T @ basis
    # Columns of zeros are rounding: of sums of 8 numbers as large as the gradient's.
    atol = 8 * np.finfo(np.float32).eps * np.abs(full["w"]).max()
    np.testing.assert_allclose(grads["w"].coordinates, projected, rtol=1e-4, atol=atol)


def test_arrays_may_be_traced_and_flags_stay_python():
    gradient = subspace_value_and_grad(with_flag, OPTIMIZER)

    @jax.jit
    def step(params, state, x):
        return gradient(params, state, x, True)[0]

    assert step(PARAMS, STATE, X) == pytest.approx(with_flag(PARAMS, X, True))


def test_a_loss_without_any_product_has_zero_gradients():
    gradient = subspace_value_and_grad(lambda p, train: 0.5, OPTIMIZER)
    value, grads, _ = gradient(PARAMS, STATE, False)
    assert value == 0.5
    assert not np.any(grads["w"].coordinates)


def test_aux_comes_out_as_it_is():
    def function(p, x):
        y = x @ p["w"]
        aux = {"y": y, "w": p["w"], "name": "loss", "n": 3, "none": None}
        return jnp.mean(y), aux

    gradient = subspace_value_and_grad(function, OPTIMIZER, has_aux=True)
    (_, aux), _, _ = gradient(PARAMS, STATE, X)
    (_, expected), _ = jax.value_and_grad(function, has_aux=True)(PARAMS, X)
    np.testing.assert_allclose(aux.pop("y"), expected.pop("y"), rtol=1e-6)
    np.testing.assert_array_equal(aux.pop("w"), expected.pop("w"))
    assert aux == expected
    assert type(aux["n"]) is int


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p: p["w"], r"must return \(scalar, aux\).* ArrayImpl|Tracer"),
        (lambda p: (p["w"], {}), "must return a scalar"),
    ],
)
def test_other_results_are_refused(returned, message):
    with pytest.raises(TypeError, match=message):
        subspace_value_and_grad(returned, OPTIMIZER, has_aux=True)(PARAMS, STATE)
