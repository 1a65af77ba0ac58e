"""Orthonormal rows from any rows: Cholesky-QR, repeated until it is there.

Rows, not columns: the long axis stands last, where a product with a (k, k) factor on
the left reads and writes it in its own layout.
"""

import jax
import jax.numpy as jnp

from lowrank_optax.rules.hashing import hashed_uniform
from lowrank_optax.rules.lapack import one_by_one

# Products that decide orthonormality; GPUs and TPUs would round float32 operands.
HIGHEST = jax.lax.Precision.HIGHEST
TOLERANCE = 1e-5  # largest entry of Q Q^T - I that counts as orthonormal
# So many passes bring out all that float32 holds of a row beside those before it; what
# is not there by then is rounding, and a new direction takes its place.
PASSES_OF_ROUNDING = 3
MAX_PASSES = 8
# Below it the distance of a row of length one from those before it is lost.
LOST = 0.5


def gram(rows: jax.Array) -> jax.Array:
    """Returns X X^T, (*stack, k, k), for X (*stack, k, n)."""
    return jnp.einsum("...kn,...ln->...kl", rows, rows, precision=HIGHEST)


def orthonormalize(rows: jax.Array, tolerance: float = TOLERANCE) -> jax.Array:
    r"""Returns Q (*stack, k, n), Q Q^T = I, whose leading rows span those of X.

    Shifted Cholesky-QR, repeated until the largest entry e of |Q Q^T - I| is at most
    ``tolerance``; the shift s fades with e:

    .. math::
        L L^\top = X X^\top + s I, \quad X \leftarrow L^{-1} X, \quad
        s = 4 \epsilon k e

    After a pass e is not measured but bounded, which needs no product: Q Q^T is
    I - s (L L^T)^{-1} and what rounding leaves in the same way, so

    .. math::
        e \le (s + 2 \epsilon \sqrt{k}) \max_i \|(L^{-1})_{i \cdot}\|^2

    Products with the (k, k) inverse factor are all that touches the long axis, so a
    mesh sharded along n exchanges k * k numbers a pass. Rows that depend on those
    before them, those of a rank-deficient matrix for instance, give way to fixed random
    directions, which the next passes make orthogonal. Matrices of the stack that are
    done are left alone: each gets what it would get by itself. Rows that are not finite
    stay so.

    Cost: 2 n k^2 multiplications a pass; one pass as a rule.

    References:
        Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
        ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020. Their
        shift is a bound for the worst case; the one here is a few units of rounding,
        with more passes behind it.
    """
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    is_zero = norms == 0
    rows = rows / jnp.where(is_zero, 1, norms)
    # At once: a matrix of zeros would take every pass, and its stack with it.
    rows = jax.lax.cond(
        jnp.any(is_zero),
        lambda: jnp.where(is_zero, _directions(rows), rows),
        lambda: rows,
    )

    def needs_pass(carry):
        passes, _, done = carry
        return (passes < MAX_PASSES) & ~jnp.all(done)

    def one_pass(carry):
        passes, q, done = carry
        passed, now_done, lost = _cholesky_pass(q, tolerance)
        # Once in a while: a direction may lie close to the rows before it, and the
        # passes in between bring out what does not.
        is_lost = lost & (passes % PASSES_OF_ROUNDING == 0)
        passed = jnp.where(is_lost[..., None], _directions(q, passes), passed)
        q = jnp.where(done[..., None, None], q, passed)
        return passes + 1, q, done | (now_done & ~jnp.any(is_lost, axis=-1))

    # One pass is nearly always enough, and outside a loop it is not copied about.
    once, done, _ = _cholesky_pass(rows, tolerance)
    start = (jnp.int32(1), once, done)
    return jax.lax.while_loop(needs_pass, one_pass, start)[1]


def _cholesky_pass(
    rows: jax.Array, tolerance: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Q = L^{-1} X, whether it is orthonormal (*stack,), and the lost rows.

    The latter, (*stack, k), are those that depend on the rows before them.
    """
    products = gram(rows)
    count = products.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(count, dtype=products.dtype), products.shape)
    rounding = jnp.finfo(products.dtype).eps
    error = jnp.max(jnp.abs(products - eye), axis=(-1, -2))
    shift = 4 * rounding * count * error
    shifted = products + shift[..., None, None] * eye
    factor, inverse = one_by_one(_factor_and_inverse, shifted)
    least = 2 * rounding * count**0.5
    spread = shift + least
    bound = spread[..., None] * jnp.sum(inverse**2, axis=-1)
    # Comparisons with NaN are false: rows that are not finite are not done, nor lost.
    lost = jnp.sum(factor * eye, axis=-1) < LOST
    passed = jnp.einsum("...kl,...ln->...kn", inverse, rows, precision=HIGHEST)
    return passed, jnp.all(bound <= max(tolerance, 2 * least), axis=-1), lost


def _factor_and_inverse(products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns L and L^{-1} of L L^T."""
    factor = jnp.linalg.cholesky(products)
    eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return factor, jax.scipy.linalg.solve_triangular(factor, eye, lower=True)


def _directions(like: jax.Array, number: jax.typing.ArrayLike = 0) -> jax.Array:
    """Returns fixed rows of about length one, of the shape of ``like``.

    Args:
        like: Rows.
        number: Other ones for another number.
    """
    start = jnp.full(like.shape[:-2], number, jnp.uint32)
    uniform = hashed_uniform(start, like.shape[-2:], like.dtype)
    return uniform * (3 / like.shape[-1]) ** 0.5
