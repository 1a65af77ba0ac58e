"""Newton-Schulz: both forms and all coefficients against float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.rules.newton_schulz import (
    MUON,
    POLAR_EXPRESS,
    coefficients_of,
    orthogonalized,
    orthogonalized_by_factor,
)
from tests import references

pytestmark = pytest.mark.usefixtures("fast_compilation")

COEFFICIENTS = {"muon": MUON, "polar_express": POLAR_EXPRESS}
every_choice = pytest.mark.parametrize("name", COEFFICIENTS)
ROWS = 24
# Singular values over the largest one, or None for a Gaussian matrix. Five steps of
# Muon enlarge those under 2e-3 by 485, and with them rounding.
SPECTRA = {
    "gaussian": None,
    "power law": 1 / np.arange(1, ROWS + 1) ** 2,
    "down to 1e-8": np.logspace(0, -8, ROWS),
    "one and 2e-3": np.r_[1, np.full(ROWS - 1, 2e-3)],
    "one and 3e-4": np.r_[1, np.full(ROWS - 1, 3e-4)],
    "one and 1e-5": np.r_[1, np.full(ROWS - 1, 1e-5)],
    "half and nothing": np.repeat([1.0, 0.0], ROWS // 2),
    "half and 1e-4": np.repeat([1.0, 1e-4], ROWS // 2),
}
FORMS = {
    "chosen": orthogonalized,
    "factor": orthogonalized_by_factor,
    "traced": lambda x, steps, c: jax.jit(orthogonalized, static_argnums=2)(
        x, jnp.asarray(steps), c
    ),
}


def matrix(columns: int, spectrum) -> np.ndarray:
    rng = np.random.default_rng(0)
    if spectrum is None:
        return rng.normal(size=(ROWS, columns)).astype(np.float32)
    left = np.linalg.qr(rng.normal(size=(ROWS, ROWS)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, ROWS)))[0]
    return ((left * spectrum) @ right.T).astype(np.float32)


def of_steps(coefficients, steps):
    return [coefficients[min(k, len(coefficients) - 1)] for k in range(steps)]


def tolerance(coefficients, steps):
    """Rounding of the input's size, 6e-8, enlarged as the smallest singular values are.

    Times 10 for the sum of the roundings of all products; without the Gram form's new
    start after three steps the errors are 100 times as large.
    """
    gain = math.prod(first for first, _, _ in of_steps(coefficients, steps))
    return 10 * 6e-8 * gain


def largest_error(found, expected):
    """Spectral norm of the difference; the expected result's is about one."""
    return np.linalg.norm(np.asarray(found, np.float64) - expected, 2)


@every_choice
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [ROWS, 4 * ROWS], ids=["square", "long"])
def test_all_forms_are_the_iteration_in_float64(name, form, columns):
    coefficients, function = COEFFICIENTS[name], FORMS[form]
    for label, spectrum in SPECTRA.items():
        x = matrix(columns, spectrum)
        expected = references.newton_schulz(x.astype(np.float64), 5, coefficients)
        for turned in (False, True):
            found = function(x.T if turned else x, 5, coefficients)
            error = largest_error(found.T if turned else found, expected)
            assert error < tolerance(coefficients, 5), (label, turned)


@every_choice
def test_the_gram_form_bears_many_steps(name):
    coefficients, steps = COEFFICIENTS[name], 8
    for label, spectrum in SPECTRA.items():
        x = matrix(4 * ROWS, spectrum)
        expected = references.newton_schulz(x.astype(np.float64), steps, coefficients)
        found = orthogonalized(x, steps, coefficients)
        limit = tolerance(coefficients, steps)
        assert largest_error(found, expected) < limit, label


def products(function, x) -> list[tuple]:
    """Returns (shape, dtype) of each product's result."""
    equations = jax.make_jaxpr(function)(x).eqns
    return [
        (e.outvars[0].aval.shape, e.outvars[0].aval.dtype)
        for e in equations
        if e.primitive.name == "dot_general"
    ]


def test_the_form_is_chosen_by_shape_dtype_and_device(monkeypatch):
    def long_products(shape, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct(shape, dtype)
        return sum(s == shape for s, _ in products(lambda x: orthogonalized(x, 5), x))

    # X itself is multiplied after the third step and after the last one.
    assert long_products((8, 16)) == 2
    assert long_products((3, 8, 16)) == 2
    assert long_products((8, 15)) == 5
    # The squares of the singular values would be lost in bfloat16.
    assert long_products((8, 16), jnp.bfloat16) == 5
    # So they would where the products of float32 are rounded to 10 bits.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert long_products((8, 16)) == 5


def test_bfloat16_is_multiplied_in_bfloat16():
    x = matrix(4 * ROWS, None)
    narrow = jnp.asarray(x, jnp.bfloat16)
    assert {dtype for _, dtype in products(lambda x: orthogonalized(x, 5), narrow)} == {
        jnp.dtype(jnp.bfloat16)
    }
    found = orthogonalized(narrow, 5)
    assert found.dtype == jnp.bfloat16
    exact = references.newton_schulz(np.asarray(narrow, np.float64), 5, MUON)
    theirs = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    theirs = theirs.update(narrow, theirs.init(narrow))[0]
    # Optax's errors in bfloat16 are 6 % here; ours differ from them by chance alone.
    assert largest_error(found, exact) < 1.5 * largest_error(theirs, exact)


@pytest.mark.parametrize("shape", [(6, 8, 12), (6, 8, 40), (2, 3, 40, 8)], ids=str)
def test_a_matrix_of_a_stack_is_orthogonalized_as_alone(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x *= np.random.default_rng(2).uniform(1e-6, 1e3, size=(*shape[:-2], 1, 1))
    found = orthogonalized(x, 5)
    for place in np.ndindex(*shape[:-2]):
        # Products of a stack may be added up in another order.
        alone = orthogonalized(x[place], 5)
        np.testing.assert_allclose(found[place], alone, atol=tolerance(MUON, 5))


def test_no_matrix_and_zeros_stay_zeros():
    for form in (orthogonalized, orthogonalized_by_factor):
        assert not np.any(form(jnp.zeros((2, 4, 16)), 5, MUON))
        assert form(jnp.zeros((0, 4, 16)), 5, MUON).shape == (0, 4, 16)


def test_float16_has_zeros_and_large_entries():
    """The norm of entries of 300 is no number of float16, and 1e-8 is 0 in it."""
    assert not np.any(orthogonalized(jnp.zeros((4, 16), jnp.float16), 5, MUON))
    x = jax.random.normal(jax.random.key(0), (4, 16))
    large = (1000 * x).astype(jnp.float16)
    assert np.max(np.abs(large)) > 300
    found = orthogonalized(large, 5, MUON)
    assert found.dtype == jnp.float16
    # float16 has 11 bits; five steps enlarge a rounding of the input a few times.
    np.testing.assert_allclose(found, orthogonalized(x, 5, MUON), atol=0.02)


# --- coefficients ------------------------------------------------------------------


def singular_values_after(coefficients, steps, low):
    values = np.geomspace(low, 1, 20_001)
    for a, b, c in of_steps(coefficients, steps):
        values = a * values + b * values**3 + c * values**5
    return values


def test_the_stated_errors_are_those_of_the_coefficients():
    # On singular values of [0.001, 1], as the docstring of scale_by_sumo states.
    stated = {3: 0.87, 4: 0.56, 5: 0.13, 6: 0.002, 7: 1e-8}
    for steps, error in stated.items():
        found = np.max(np.abs(singular_values_after(POLAR_EXPRESS, steps, 1e-3) - 1))
        assert 0.6 * error < found < error, steps
    values = singular_values_after(MUON, 5, 0.0021)
    assert 0.68 < values.min() < 0.7
    assert 1.19 < values.max() < 1.21


def nearest_quintic(low, high):
    """Returns a, b, c and the largest error of a s + b s^3 + c s^5 to 1: Remez."""
    points = np.linspace(low, high, 4)
    for _ in range(50):
        powers = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(powers, np.ones(4))
        inside = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))
        points = np.array([low, *inside, high])
    return (a, b, c), abs(error)


def test_the_coefficients_of_polar_express_are_the_nearest_quintics():
    low, high = 1e-3, 1.0
    for k, triple in enumerate(POLAR_EXPRESS[:-1]):
        # 1 % is left for singular values that rounding has enlarged.
        expected, error = nearest_quintic(low, 1.01 * high)
        np.testing.assert_allclose(triple, expected, atol=1e-6, err_msg=str(k))
        low, high = 1 - error, 1 + error
    np.testing.assert_allclose(POLAR_EXPRESS[-1], nearest_quintic(0.99, 1.01)[0], 1e-3)


def test_coefficients_are_named_or_given():
    triple = (1.5, -0.5, 0)
    assert coefficients_of("muon") == MUON
    assert coefficients_of(triple) == (triple,)
    assert coefficients_of([triple, (1, 0, 0)]) == (triple, (1, 0, 0))
    assert coefficients_of(np.asarray([triple])) == (triple,)
    x = np.asarray([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], np.float32)
    # s = 0.6 and 0.8, one step of Newton's own iteration.
    found = orthogonalized(x, 1, coefficients_of(triple))
    np.testing.assert_allclose(np.diag(found), [0.792, 0.944], rtol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        *("Muon", (), (1.0, 2.0), [(1.0, 2.0)], [(1, 2, 3), (1, 2)], 3.0, None),
        *((1.0, float("nan"), 0.0), np.zeros((0, 3)), np.zeros((2, 2, 3))),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda c: lowrank_optax.sumo(0.1, 4, ns_coefficients=c),
        lambda c: lowrank_optax.low_rank_muon(0.1, 4, ns_coefficients=c),
        lambda c: lowrank_optax.orthogonalized_residual(ns_coefficients=c),
    ],
    ids=["sumo", "low_rank_muon", "orthogonalized_residual"],
)
def test_other_coefficients_are_refused(make, bad):
    with pytest.raises(ValueError, match=r"must be one of \('muon', 'polar_express'\)"):
        make(bad)


@every_choice
@pytest.mark.parametrize("method", ["sumo", "low_rank_muon"])
def test_methods_take_coefficients_and_traced_steps(method, name):
    build = getattr(lowrank_optax, method)
    params = {"w": jnp.asarray(matrix(2 * ROWS, SPECTRA["power law"]))}

    def update(tx):
        return jax.jit(tx.update)(params, tx.init(params), params)[0]["w"]

    def optimizer(ns_steps):
        return build(0.1, 4, ns_steps=ns_steps, ns_coefficients=name)

    found = update(optimizer(6))
    # A traced number of steps has another form, and the same result.
    traced = update(optax.inject_hyperparams(optimizer)(ns_steps=6))
    limit = tolerance(COEFFICIENTS[name], 6)
    assert largest_error(traced / 0.1, np.asarray(found, np.float64) / 0.1) < limit
    other = update(build(0.1, 4, ns_steps=6))
    assert (largest_error(found, np.asarray(other, np.float64)) < 1e-6) == (
        name == "muon"
    )


def test_a_state_of_the_default_is_that_of_optax():
    tree = {"w": jnp.ones((4, 8))}
    sumo = lowrank_optax.scale_by_sumo(8).init(tree).inner_state
    muon = optax.contrib.scale_by_muon().init(tree)
    ours = next(s for s in jax.tree.leaves(sumo, is_leaf=_is_muon) if _is_muon(s))
    assert jax.tree.structure(ours) == jax.tree.structure(muon)
    np.testing.assert_array_equal(ours.ns_coeffs, muon.ns_coeffs)


def _is_muon(node):
    return isinstance(node, optax.contrib.MuonState)


def test_the_last_coefficients_count_from_there_on():
    first, last = (2.0, 0.0, 0.0), (1.5, -0.5, 0.0)
    x = np.asarray([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], np.float32)
    s = 2 * np.asarray([0.6, 0.8])
    for _ in range(4):
        s = 1.5 * s - 0.5 * s**3
    for steps in (5, jnp.int32(5)):
        for form in (orthogonalized, orthogonalized_by_factor):
            found = form(x, steps, (first, last))
            np.testing.assert_allclose(np.diag(found), s, rtol=1e-5)
