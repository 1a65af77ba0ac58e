"""Orthonormal rows from any rows: Cholesky-QR, and QR where it is not safe.

Rows, not columns: the long axis stands last, where a product with a (k, k) factor on
the left reads and writes it in its own layout.
"""

import jax
import jax.numpy as jnp

# Products that decide orthonormality; GPUs and TPUs would round float32 operands.
HIGHEST = jax.lax.Precision.HIGHEST
TOLERANCE = 1e-5  # largest entry of Q Q^T - I that counts as orthonormal
MAX_PASSES = 4


def gram(rows: jax.Array) -> jax.Array:
    """Returns X X^T, (*stack, k, k), for X (*stack, k, n)."""
    return jnp.einsum("...kn,...ln->...kl", rows, rows, precision=HIGHEST)


def orthonormalize(rows: jax.Array, tolerance: float = TOLERANCE) -> jax.Array:
    r"""Returns Q (*stack, k, n), Q Q^T = I, whose leading rows span those of X.

    Shifted Cholesky-QR, repeated until the largest entry e of |Q Q^T - I| is at most
    ``tolerance``; the shift s fades with e:

    .. math::
        L L^\top = X X^\top + s I, \quad X \leftarrow L^{-1} X, \quad
        s = 4 \epsilon \, \mathrm{tr}(X X^\top) \min(e, 1)

    Products with the (k, k) inverse factor are all that touches the long axis, so a
    mesh sharded along n exchanges k * k numbers a pass. Matrices of the stack that do
    not get there, rank-deficient ones above all, take Householder QR, which completes
    them by directions of its own. Rows that are not finite stay so.

    Cost: 2 n k^2 multiplications a pass and n k^2 more; one pass as a rule.

    References:
        Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
        ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020. Their
        shift is a bound for the worst case; the one here is a few units of rounding,
        with QR behind it.
    """
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows / jnp.where(norms > 0, norms, 1)

    def is_done(products):
        # Not by the largest entry: XLA's maximum may pass over NaN (see subspace.py).
        near = jnp.abs(products - _eye_like(products)) <= tolerance
        return jnp.all(near, axis=(-1, -2))

    def needs_pass(carry):
        passes, _, products = carry
        return (passes < MAX_PASSES) & ~jnp.all(is_done(products))

    def one_pass(carry):
        passes, q, products = carry
        # Matrices that are done are left alone: each gets what it would get by itself.
        done = is_done(products)[..., None, None]
        q_next = jnp.where(done, q, _cholesky_pass(q, products))
        return passes + 1, q_next, gram(q_next)

    once = _cholesky_pass(rows, gram(rows))
    products = gram(once)

    def carefully():
        start = (jnp.int32(1), once, products)
        _, q, last = jax.lax.while_loop(needs_pass, one_pass, start)
        done = is_done(last)

        def with_fallback():
            columns, _ = jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))
            return jnp.where(done[..., None, None], q, jnp.swapaxes(columns, -1, -2))

        return jax.lax.cond(jnp.all(done), lambda: q, with_fallback)

    # One pass is nearly always enough, and outside a loop it is not copied about.
    return jax.lax.cond(jnp.all(is_done(products)), lambda: once, carefully)


def _eye_like(products: jax.Array) -> jax.Array:
    eye = jnp.eye(products.shape[-1], dtype=products.dtype)
    return jnp.broadcast_to(eye, products.shape)


def _cholesky_pass(rows: jax.Array, products: jax.Array) -> jax.Array:
    eye = _eye_like(products)
    error = jnp.max(jnp.abs(products - eye), axis=(-1, -2))
    trace = jnp.trace(products, axis1=-2, axis2=-1)
    shift = 4 * jnp.finfo(products.dtype).eps * trace * jnp.minimum(error, 1)
    factor = jnp.linalg.cholesky(products + shift[..., None, None] * eye)
    inverse = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
    return jnp.einsum("...kl,...ln->...kn", inverse, rows, precision=HIGHEST)
