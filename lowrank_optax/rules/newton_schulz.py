r"""Newton-Schulz: the orthogonal factor of each matrix of a stack, on any mesh.

Step k with the coefficients (a, b, c) takes X (r, l), r its shorter side, to

    X <- (a I + b G + c G^2) X,  G = X X^T,

and so each singular value s to a s + b s^3 + c s^5. It begins with X / ||X||_F.

Several steps in a row need no X between them: G becomes p G p and their polynomials p
are multiplied, all (r, r). This is the Gram form. G has the squares of the singular
values, and float32 loses those under 3e-4 of the norm, which five steps enlarge 485
times. So G is made again from X after every third step. The error in float32, the
spectral norm of the difference to float64, was then at most 2e-5 after five of Muon's
steps, as in the plain form; after five of Polar Express 2e-4, in the plain form 4e-5;
without a new G 3e-3 and 2e-2. The spectra are those of tests/test_newton_schulz.py.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.checks import as_count
from lowrank_optax.matrix.arrays import wide as dtype_of_sums
from lowrank_optax.matrix.shares import in_shares
from lowrank_optax.rules.orthonormal import HIGHEST

Triples = tuple[tuple[float, float, float], ...]

MUON: Triples = ((3.4445, -4.7750, 2.0315),)
# The odd quintic nearest to 1 on the interval [s, 1.01 S] that the step before has made
# of [0.001, 1]; tests/test_newton_schulz.py computes them again. The last is the limit.
POLAR_EXPRESS: Triples = (
    (8.386893, -24.371311, 17.726412),
    (4.143012, -3.018618, 0.552650),
    (3.931188, -2.874113, 0.536722),
    (3.282798, -2.416554, 0.486531),
    (2.284975, -1.632360, 0.403066),
    (1.882279, -1.248530, 0.366556),
    (1.875, -1.25, 0.375),
)
NAMED = {"muon": MUON, "polar_express": POLAR_EXPRESS}

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

EPS = 1e-8  # optax.contrib.scale_by_muon's
GRAM_STEPS = 3  # after more of them rounding shows, in float32
LEAST_GRAM_RATIO = 2  # long side / short side; measured on two CPU cores


def as_steps(ns_steps: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Returns a number of steps as an int, or as it is if it is an array of JAX.

    Raises:
        ValueError: If it is no int, or below 1.
    """
    if isinstance(ns_steps, jax.Array):
        return ns_steps
    return as_count("ns_steps", ns_steps)


def coefficients_of(ns_coefficients: Coefficients) -> Triples:
    """Returns the coefficients of each step; the last ones count from there on.

    Args:
        ns_coefficients: "muon", "polar_express", three numbers, or a sequence of three
            numbers for each step.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(ns_coefficients, str) and ns_coefficients in NAMED:
        return NAMED[ns_coefficients]
    table: np.ndarray = np.empty((0, 0))
    with contextlib.suppress(TypeError, ValueError):
        table = np.atleast_2d(np.asarray(ns_coefficients, np.float64))
    is_table = table.ndim == 2 and table.shape[1] == 3 and table.size
    if is_table and np.all(np.isfinite(table)):
        return tuple((a, b, c) for a, b, c in table.tolist())
    raise ValueError(
        f"ns_coefficients must be one of {tuple(NAMED)}, three finite numbers (a, b, "
        f"c), or a sequence of such triples, one a step; got {ns_coefficients!r}."
    )


def orthogonalized(
    matrices: jax.Array, ns_steps: jax.typing.ArrayLike, coefficients: Triples = MUON
) -> jax.Array:
    """Returns orth(X), orth(U S V^T) = U V^T, for a stack X of any dtype.

    Products are in X's dtype, in bfloat16 for bfloat16. The Gram form is taken on CPUs,
    from float32 on, if the longer side is at least twice the shorter one: it costs
    4 l r^2 multiplications and 14 r^3 for five steps in the place of 10 l r^2 and
    5 r^3. Accelerators multiply float32 faster at a lower precision, which the Gram
    form does not bear. On a mesh each device orthogonalizes its share of whole
    matrices, and the results are redistributed; see :func:`in_shares`.

    Args:
        matrices: X; (*stack, n, m).
        ns_steps: Steps. A traced number is possible, without the Gram form.
        coefficients: See :func:`coefficients_of`.
    """

    def orthogonal(x: jax.Array) -> jax.Array:
        # EPS is 0 in float16, and squares above 65,504 are infinite.
        exact = x.astype(dtype_of_sums(x.dtype))
        norm = jnp.linalg.norm(exact, axis=(-2, -1), keepdims=True)
        wide = _wide((exact / (norm + EPS)).astype(x.dtype))
        if not isinstance(ns_steps, int):
            return _oriented_like(x, _steps(wide, ns_steps, coefficients))
        rows, columns = wide.shape[-2:]
        is_long = columns >= LEAST_GRAM_RATIO * rows
        for triples in _groups(ns_steps, coefficients, wide if is_long else None):
            wide = _polynomial(wide, triples) @ wide
        return _oriented_like(x, wide)

    return in_shares(orthogonal, matrices)


def orthogonalized_by_factor(
    matrices: jax.Array, ns_steps: jax.typing.ArrayLike, coefficients: Triples = MUON
) -> jax.Array:
    """Returns orth(X) of a stack that is shared out, moving less if X is long.

    Newton-Schulz multiplies X (r, l) by polynomials of X X^T, so orth(X) = Q X with Q
    (r, r). Each device makes Q for its share of whole matrices, and all devices get all
    Q. This gathers r^2 numbers a matrix in the place of l r. Q X has X's sharding.

    Args:
        matrices: X; (*stack, n, m), r the shorter side; float32 or wider. Q enlarges
            roundings of X as the steps do, up to 485 times for five of Muon's.
        ns_steps: Steps. A traced number gathers X's size.
        coefficients: See :func:`coefficients_of`.
    """
    if not isinstance(ns_steps, int):
        return orthogonalized(matrices, ns_steps, coefficients)
    steps = ns_steps

    def factor(x: jax.Array) -> jax.Array:
        scale = 1 / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)
        x, whole = scale * x, scale * jnp.eye(x.shape[-2], dtype=x.dtype)
        for triples in _groups(steps, coefficients, x):
            polynomial = _polynomial(x, triples)
            x, whole = polynomial @ x, _exact(polynomial, whole)
        return whole

    wide = _wide(matrices)
    return _oriented_like(matrices, _exact(in_shares(factor, wide, to_all=True), wide))


def _groups(
    steps: int, coefficients: Triples, to_square: jax.Array | None
) -> list[Triples]:
    """Returns the coefficients of all steps, in groups that share one X X^T.

    Args:
        steps: Steps.
        coefficients: See :func:`coefficients_of`.
        to_square: The matrices, if it pays to leave X alone for several steps.
    """
    each = (*coefficients, *coefficients[-1:] * steps)[:steps]
    bears_it = (
        to_square is not None
        and jnp.finfo(to_square.dtype).bits >= 32
        and jax.default_backend() == "cpu"
    )
    length = GRAM_STEPS if bears_it else 1
    return [each[i : i + length] for i in range(0, steps, length)]


def _polynomial(wide: jax.Array, triples: Triples) -> jax.Array:
    """Returns Q (*stack, r, r), for which Q X has taken the steps of a group."""
    product = jnp.matmul if len(triples) == 1 else _exact
    gram, whole = product(wide, jnp.swapaxes(wide, -1, -2)), None
    one = jnp.broadcast_to(jnp.eye(wide.shape[-2], dtype=wide.dtype), gram.shape)
    for first, second, third in triples:
        each = first * one + second * gram + third * product(gram, gram)
        whole = each if whole is None else product(each, whole)
        gram = product(product(each, gram), each)
    assert whole is not None
    return whole


def _steps(
    wide: jax.Array, steps: jax.typing.ArrayLike, coefficients: Triples
) -> jax.Array:
    """Returns X after a traced number of steps."""
    table = jnp.asarray(coefficients, wide.dtype)

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        first, second, third = table[jnp.minimum(k, len(table) - 1)]
        gram = x @ jnp.swapaxes(x, -1, -2)
        return first * x + (second * gram + third * (gram @ gram)) @ x

    return jax.lax.fori_loop(0, steps, step, wide)


def _wide(x: jax.Array) -> jax.Array:
    """Returns X with its shorter side first."""
    return jnp.swapaxes(x, -1, -2) if x.shape[-2] > x.shape[-1] else x


def _oriented_like(x: jax.Array, wide: jax.Array) -> jax.Array:
    return jnp.swapaxes(wide, -1, -2) if x.shape[-2] > x.shape[-1] else wide


def _exact(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)
