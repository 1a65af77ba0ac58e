"""Orthonormal rows whatever comes in, and the leading spans kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.rules.orthonormal import TOLERANCE, _cholesky_pass, orthonormalize

ROWS, COLUMNS = 24, 6


@functools.cache
def compiled():
    """Takes and returns columns, which is how the cases are written."""
    return jax.jit(
        lambda x: jnp.swapaxes(orthonormalize(jnp.swapaxes(x, -1, -2)), -1, -2)
    )


def _gaussian(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, COLUMNS))


def _with_condition(condition: float) -> np.ndarray:
    left, _, right = np.linalg.svd(_gaussian(), full_matrices=False)
    return left * np.geomspace(1, 1 / condition, COLUMNS) @ right


def _with_rank(rank: int) -> np.ndarray:
    return _gaussian()[:, :rank] @ _gaussian(1)[:rank, :COLUMNS]


def _with_zero_columns() -> np.ndarray:
    columns = _gaussian()
    columns[:, [1, 4]] = 0
    return columns


CASES = {
    "gaussian": _gaussian(),
    "orthonormal": np.linalg.qr(_gaussian())[0],
    "columns of many scales": _gaussian() * np.geomspace(1e12, 1e-12, COLUMNS),
    "condition 1e2": _with_condition(1e2),
    "condition 1e4": _with_condition(1e4),
    "condition 1e7": _with_condition(1e7),
    "condition 1e10": _with_condition(1e10),
    "rank 1": _with_rank(1),
    "rank 3": _with_rank(3),
    "equal columns": np.repeat(_gaussian()[:, :1], COLUMNS, axis=1),
    "zero columns": _with_zero_columns(),
    "zero": np.zeros((ROWS, COLUMNS)),
}
every_case = pytest.mark.parametrize("case", CASES)


def _result(case: str) -> np.ndarray:
    return np.asarray(compiled()(jnp.asarray(CASES[case], jnp.float32)), np.float64)


@every_case
def test_columns_are_orthonormal(case):
    q = _result(case)
    # The products are computed again here: their own float32 rounding comes on top.
    np.testing.assert_allclose(q.T @ q, np.eye(COLUMNS), atol=2 * TOLERANCE)


@every_case
def test_leading_columns_span_those_that_came_in(case):
    q, x = _result(case), CASES[case].astype(np.float32).astype(np.float64)
    for k in range(1, COLUMNS + 1):
        beyond = x[:, :k] - q[:, :k] @ (q[:, :k].T @ x[:, :k])
        # Backward stable: the columns keep their span to rounding, of each one's norm.
        norms = np.linalg.norm(x[:, :k], axis=0)
        assert np.all(np.linalg.norm(beyond, axis=0) <= 1e-5 * norms)


@pytest.mark.parametrize("size", [4, 24, 120])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_the_bound_of_one_pass_holds(size, decay):
    """It decides whether another one is needed: measured in float64."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(size, size)))
    right, _ = np.linalg.qr(rng.normal(size=(4 * size, size)))
    rows = (left * (1.0 + np.arange(size)) ** -decay) @ right.T
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = jnp.asarray(rows, jnp.float32)
    q = np.asarray(_cholesky_pass(rows, 1.0)[0], np.float64)
    error = np.max(np.abs(q @ q.T - np.eye(size)))

    def is_done(tolerance):
        return bool(_cholesky_pass(rows, tolerance)[1])

    # What the bound grants to rounding: no tolerance is taken for smaller.
    least = 4 * float(jnp.finfo(jnp.float32).eps) * size**0.5
    # Never accepted with a larger error, and of use: accepted where it is little
    # smaller. Of the bound, rounding is 1 / (2 sqrt(size)) of the shift's part, and
    # 2 eps sqrt(size) where no shift is needed.
    assert not is_done(0.99 * error) or error <= least
    assert is_done(1.3 * error + 3e-6)


def test_columns_that_are_not_finite_stay_so():
    columns = _gaussian()
    columns[3, 2] = np.nan
    assert not np.all(np.isfinite(compiled()(jnp.asarray(columns, jnp.float32))))


@pytest.mark.parametrize("size", [8, 96])
def test_what_a_cholesky_pass_makes_not_a_number_is_never_accepted(size):
    # From 64 x 64 on, XLA's maximum on a CPU passes over NaN (jaxlib 0.10 and 0.11).
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(4 * size, size)) * np.geomspace(1, 1e-30, size)
    columns = columns @ rng.normal(size=(size, size))
    q = np.asarray(compiled()(jnp.asarray(columns, jnp.float32)), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=2 * TOLERANCE)


def test_each_matrix_of_a_stack_gets_what_it_gets_alone():
    broken = _gaussian()
    broken[0, 0] = np.nan
    stack = np.stack([*CASES.values(), broken]).astype(np.float32)
    together = np.asarray(compiled()(jnp.asarray(stack)))
    for case, q in zip(CASES, together, strict=False):
        # A batched product may add in another order: rounding, amplified by the
        # condition, is all that can differ; spans are compared where it is moderate.
        np.testing.assert_allclose(q.T @ q, np.eye(COLUMNS), atol=2 * TOLERANCE)
        if case in ("gaussian", "orthonormal", "condition 1e2", "zero"):
            np.testing.assert_allclose(q, _result(case), atol=1e-4)


@pytest.mark.parametrize("kind", ["rank one", "equal", "zero", "repeated"])
@pytest.mark.parametrize(("count", "length"), [(64, 64), (60, 64), (8, 9), (40, 128)])
def test_rows_that_leave_hardly_a_direction_free_get_it_nevertheless(
    count, length, kind
):
    """A new direction lies close to the rows before it where these fill the space.

    The widest of these take seven passes of the eight.
    """
    rng = np.random.default_rng(0)
    rows = {
        "rank one": np.outer(rng.normal(size=count), rng.normal(size=length)),
        "equal": np.ones((count, length)),
        "zero": np.zeros((count, length)),
        "repeated": np.tile(rng.normal(size=(4, length)), (count // 4, 1)),
    }[kind]
    found = jax.jit(orthonormalize)(jnp.asarray(rows, jnp.float32))
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found @ found.T, np.eye(count), atol=TOLERANCE)
