"""Orthonormal rows from any rows, by repeated Cholesky-QR.

Vectors are rows here, so that the long axis is last. A product with a (k, k) factor on
the left then reads and writes the array in its own layout.
"""

import jax
import jax.numpy as jnp

from lowrank_optax.rules.hashing import hashed_uniform
from lowrank_optax.rules.lapack import one_by_one

# For products that decide orthonormality: GPUs and TPUs would round float32 operands.
HIGHEST = jax.lax.Precision.HIGHEST
TOLERANCE = 1e-5  # largest entry of Q Q^T - I that counts as orthonormal
# After so many passes float32 holds nothing more of a row beside the rows before it. A
# row that is still lost is rounding, and a new direction takes its place.
PASSES_OF_ROUNDING = 3
MAX_PASSES = 8
# A unit row is lost if its distance from the span of the rows before it is below this.
LOST = 0.5


def gram(rows: jax.Array) -> jax.Array:
    """Returns X X^T, (*stack, k, k), for X (*stack, k, n)."""
    return jnp.einsum("...kn,...ln->...kl", rows, rows, precision=HIGHEST)


def orthonormalize(rows: jax.Array, tolerance: float = TOLERANCE) -> jax.Array:
    r"""Returns Q (*stack, k, n) with Q Q^T = I; leading rows of Q and X span the same.

    The method is shifted Cholesky-QR, repeated until the largest entry e of
    |Q Q^T - I| is at most ``tolerance``. The shift s falls with e:

    .. math::
        L L^\top = X X^\top + s I, \quad X \leftarrow L^{-1} X, \quad
        s = 4 \epsilon k e

    After a pass e is bounded without a product. Q Q^T is I - s (L L^T)^{-1}, and
    rounding adds a term of the same form, so

    .. math::
        e \le (s + 2 \epsilon \sqrt{k}) \max_i \|(L^{-1})_{i \cdot}\|^2

    Only products with the (k, k) inverse factor touch the long axis, so a mesh sharded
    along n exchanges k * k numbers a pass. A row that depends on the rows before it, as
    in a rank-deficient matrix, is replaced by a fixed random direction; later passes
    make this direction orthogonal. A finished matrix of the stack no longer changes:
    each matrix gets the same result as alone. Rows that are not finite stay so.

    Cost: 2 n k^2 multiplications a pass; usually one pass.

    References:
        Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
        ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020. The paper's
        shift bounds the worst case. The shift here is a few units of rounding, and more
        passes make up for it.
    """
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    is_zero = norms == 0
    rows = rows / jnp.where(is_zero, 1, norms)
    # Before the first pass: a zero matrix would hold its stack for all passes.
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
        # Not at every pass: a new direction may lie close to the rows before it, and
        # the passes in between bring out its orthogonal part.
        is_lost = lost & (passes % PASSES_OF_ROUNDING == 0)
        passed = jnp.where(is_lost[..., None], _directions(q, passes), passed)
        q = jnp.where(done[..., None, None], q, passed)
        return passes + 1, q, done | (now_done & ~jnp.any(is_lost, axis=-1))

    # One pass is nearly always enough; outside the loop its result is not copied.
    once, done, _ = _cholesky_pass(rows, tolerance)
    start = (jnp.int32(1), once, done)
    return jax.lax.while_loop(needs_pass, one_pass, start)[1]


def _cholesky_pass(
    rows: jax.Array, tolerance: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Q = L^{-1} X, whether Q is orthonormal (*stack,), and the lost rows.

    A lost row, (*stack, k), depends on the rows before it.
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
    # Comparisons with NaN are false: a row that is not finite is neither done nor lost.
    lost = jnp.sum(factor * eye, axis=-1) < LOST
    passed = jnp.einsum("...kl,...ln->...kn", inverse, rows, precision=HIGHEST)
    return passed, jnp.all(bound <= max(tolerance, 2 * least), axis=-1), lost


def _factor_and_inverse(products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns L and L^{-1} of L L^T."""
    factor = jnp.linalg.cholesky(products)
    eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return factor, jax.scipy.linalg.solve_triangular(factor, eye, lower=True)


def _directions(like: jax.Array, number: jax.typing.ArrayLike = 0) -> jax.Array:
    """Returns fixed rows of length about one, in the shape of ``like``.

    Args:
        like: Rows.
        number: Number of the draw: different numbers give different rows.
    """
    start = jnp.full(like.shape[:-2], number, jnp.uint32)
    uniform = hashed_uniform(start, like.shape[-2:], like.dtype)
    return uniform * (3 / like.shape[-1]) ** 0.5
