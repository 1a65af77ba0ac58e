"""Computed bases: what they span, its order, and what they capture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax
from lowrank_optax.rules.bases import captured_energies
from lowrank_optax.rules.hashing import hashed_uniform
from tests import references
from tests.suite import random_like

ROWS, COLUMNS, RANK = 20, 14, 4


@functools.cache
def _compiled(rule):
    return jax.jit(rule.compute)


def compute(rule, matrix, previous=None, seed=0):
    """Runs a rule on one float32 matrix; the basis in float64."""
    if previous is None:
        previous = np.zeros((matrix.shape[1], RANK))
    arrays = (jnp.asarray(x, jnp.float32) for x in (matrix, previous))
    basis = _compiled(rule)(*arrays, jnp.uint32(seed))
    return np.asarray(basis, np.float64)


def gradient(values, seed=0, rows=ROWS, columns=COLUMNS):
    """Returns a matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return (u * np.asarray(values)) @ v.T


def captured(matrix, basis):
    return np.sum((matrix @ basis) ** 2) / np.sum(matrix**2)


DECAYING = gradient(0.7 ** np.arange(10))
FINDERS = {
    "no power iteration": lowrank_optax.range_finder(2, power_iterations=0),
    "plain": lowrank_optax.range_finder(oversample=2),
    "two power iterations": lowrank_optax.range_finder(2, power_iterations=2),
    "warm": lowrank_optax.range_finder(2, warm_start=True),
    "warm, whole": lowrank_optax.range_finder(2, power_iterations=1, warm_start=True),
}
every_finder = pytest.mark.parametrize("name", FINDERS)
SVD = lowrank_optax.exact_svd()
RULES = {"exact_svd": SVD, **FINDERS, "dct_columns": lowrank_optax.dct_columns()}
every_rule = pytest.mark.parametrize("name", RULES)


@every_finder
def test_the_range_finder_is_its_equations(name):
    rule = FINDERS[name]
    on_projected_side = rule.warm_start or rule.power_iterations % 1
    length = COLUMNS if on_projected_side else ROWS
    draw = hashed_uniform(jnp.uint32(6), (RANK + 2, length), jnp.float32)
    omega = np.asarray(draw, np.float64).T
    previous = np.linalg.qr(gradient(np.ones(RANK), 1)[:COLUMNS, :RANK])[0]
    # A column out of use: the warm start fills up with a random one.
    previous[:, 3] = 0
    iterations = rule.power_iterations
    if rule.warm_start:
        omega = references.warm_start(omega, previous)
        iterations = np.floor(iterations) + 0.5
    found = compute(rule, DECAYING, previous, seed=6)
    columns, _ = references.range_finder(DECAYING, omega, RANK, iterations)
    signs = np.sign(np.sum(columns * found, axis=0))
    # float32 over the smallest gap between the squared singular values, 0.7^8 of 0.5.
    np.testing.assert_allclose(found, columns * signs, atol=5e-5)


def test_the_svd_is_numpys():
    found = compute(SVD, DECAYING)
    columns, energies = references.exact_svd(DECAYING, RANK)
    signs = np.sign(np.sum(columns * found, axis=0))
    # Float32 rounding over the gaps between the singular values, 0.1.
    np.testing.assert_allclose(found, columns * signs, atol=1e-5)
    arrays = (jnp.asarray(x, jnp.float32) for x in (DECAYING, found))
    np.testing.assert_allclose(captured_energies(*arrays), energies, rtol=1e-5)


@every_rule
@pytest.mark.parametrize("rank", [1, 2, 10, COLUMNS])
def test_columns_are_orthonormal_whatever_the_rank_of_the_gradient(name, rank):
    basis = compute(RULES[name], gradient(0.7 ** np.arange(rank)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=2e-5)


@pytest.mark.parametrize("name", ["exact_svd", *FINDERS])
@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_a_gradient_of_no_more_than_the_rank_is_reproduced(name, rank):
    matrix = gradient(0.5 ** np.arange(rank))
    basis = compute(RULES[name], matrix)
    # Float32 rounding of the columns, each of norm 1.
    np.testing.assert_allclose(matrix @ basis @ basis.T, matrix, atol=3e-6)


@pytest.mark.parametrize("name", ["exact_svd", "plain", "dct_columns"])
def test_a_larger_rank_captures_no_less_energy(name):
    shares = [
        captured(DECAYING, compute(RULES[name], DECAYING, np.zeros((COLUMNS, rank))))
        for rank in (1, RANK, 7)
    ]
    assert np.all(np.diff(shares) > 0)


@every_rule
def test_energies_say_what_each_column_captures(name):
    basis = compute(RULES[name], DECAYING)
    arrays = (jnp.asarray(x, jnp.float32) for x in (DECAYING, basis))
    expected = references.captured(DECAYING, basis)
    # Sums of squares in float32.
    np.testing.assert_allclose(captured_energies(*arrays), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in RULES if name != "no power iteration"]
)
def test_leading_columns_capture_more_than_any_other_choice_of_the_columns(name):
    shares = references.captured(DECAYING, compute(RULES[name], DECAYING))
    assert np.all(np.diff(shares) < 0)


def test_power_iterations_bring_the_energy_near_the_svd():
    flat = gradient(0.9 ** np.arange(COLUMNS))
    best = captured(flat, compute(SVD, flat))
    plain = captured(flat, compute(FINDERS["plain"], flat))
    sharpened = captured(flat, compute(FINDERS["two power iterations"], flat))
    assert plain < sharpened <= best * (1 + 1e-6)
    assert sharpened > 0.98 * best


def test_a_warm_start_from_the_right_subspace_keeps_it():
    right = compute(SVD, DECAYING)
    kept = compute(FINDERS["warm"], DECAYING, right)
    # Already singular vectors: the random columns beside them move them by 1e-2.
    np.testing.assert_allclose(np.abs(np.sum(kept * right, axis=0)), 1, atol=1e-3)


def test_oversampling_beyond_the_matrix_is_cut_and_exact():
    wide = lowrank_optax.range_finder(oversample=100)
    found = captured(DECAYING, compute(wide, DECAYING))
    best = captured(DECAYING, compute(SVD, DECAYING))
    np.testing.assert_allclose(found, best, rtol=1e-4)


@every_rule
@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf, -np.inf])
def test_what_has_no_basis_gets_zeros(name, entry):
    matrix = DECAYING * (entry != 0)
    matrix[3, 5] = entry
    assert not np.any(compute(RULES[name], matrix))


@every_rule
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_a_power_of_two_changes_nothing(name, scale):
    """Squares of such entries overflow float32, or underflow."""
    basis = compute(RULES[name], DECAYING)
    scaled = compute(RULES[name], scale * DECAYING)
    # Scaled by the largest entry, which is no power of two: rounding, over gaps.
    np.testing.assert_allclose(scaled, basis, atol=5e-5)
    arrays = [jnp.asarray(x, jnp.float32) for x in (scale * DECAYING, basis)]
    expected = references.captured(DECAYING, basis)
    np.testing.assert_allclose(captured_energies(*arrays), expected, rtol=1e-5)


def test_hashed_draws_are_spread_and_their_rows_independent():
    draws = np.asarray(hashed_uniform(jnp.arange(2, dtype=jnp.uint32), (7, 999), float))
    assert draws.shape == (2, 7, 999)
    assert np.max(np.abs(draws)) < 1
    rows = draws.reshape(14, 999)
    # Four standard errors of 999 draws: of a mean, a variance, and a correlation. The
    # variance of u^2 is 1 / 5 - 1 / 9.
    deviation = np.sqrt(1 / 3)
    assert np.all(np.abs(np.mean(rows, axis=1)) < 4 * deviation / np.sqrt(999))
    error = np.sqrt((1 / 5 - 1 / 9) / 999)
    assert np.all(np.abs(np.mean(rows**2, axis=1) - 1 / 3) < 4 * error)
    correlations = np.corrcoef(rows) - np.eye(14)
    assert np.all(np.abs(correlations) < 4 / np.sqrt(999))
    # A hash of the place, not a table: columns of one matrix differ as rows do.
    between = np.corrcoef(rows[:, 1:].ravel(), rows[:, :-1].ravel())[0, 1]
    assert abs(between) < 4 / np.sqrt(14 * 998)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, again = (compute(FINDERS["plain"], DECAYING, seed=3) for _ in "ab")
    other = compute(FINDERS["plain"], DECAYING, seed=4)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("name", ["exact_svd", "warm", "dct_columns"])
def test_each_matrix_of_a_stack_gets_the_basis_that_it_gets_alone(name):
    stack = np.stack([DECAYING, gradient([1.0], 1), gradient(0.6 ** np.arange(9), 2)])
    previous = np.zeros((3, COLUMNS, RANK))
    seeds = jnp.arange(3, dtype=jnp.uint32)
    arrays = (jnp.asarray(x, jnp.float32) for x in (stack, previous))
    together = np.asarray(_compiled(RULES[name])(*arrays, seeds))
    for matrix, basis, seed in zip(stack, together, seeds, strict=True):
        arrays = (jnp.asarray(x, jnp.float32) for x in (matrix, previous[0]))
        alone = np.asarray(_compiled(RULES[name])(*arrays, seed))
        # Projections of the matrix are compared: what completes a gradient of rank one
        # is rounding. Batched products may add in another order.
        np.testing.assert_allclose(
            matrix @ basis @ basis.T, matrix @ alone @ alone.T, atol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"oversample": -1}, "oversample must be an int >= 0, got -1"),
        ({"oversample": 1.5}, "oversample must be an int >= 0, got 1.5"),
        ({"power_iterations": -2}, "power_iterations must be a multiple of 0.5.* -2"),
        ({"power_iterations": 0.3}, "power_iterations must be a multiple of 0.5.* 0.3"),
    ],
)
def test_a_count_out_of_its_range_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        lowrank_optax.range_finder(**arguments)


def test_each_matrix_of_a_stack_has_energies_of_its_own():
    matrices = random_like({"w": (2, 9, 6)})["w"] * jnp.array([1.0, 3.0])[:, None, None]
    basis = jnp.broadcast_to(jnp.eye(6), (2, 6, 6))
    found = captured_energies(matrices, basis)
    np.testing.assert_allclose(jnp.sum(found, -1), 1, rtol=1e-5)
