"""Orthonormal columns from any columns: Cholesky-QR, and QR where it is not safe."""

import jax
import jax.numpy as jnp

# Products that decide orthonormality; GPUs and TPUs would round float32 operands.
HIGHEST = jax.lax.Precision.HIGHEST
TOLERANCE = 1e-5  # largest entry of Q^T Q - I that counts as orthonormal
MAX_PASSES = 4


def gram(columns: jax.Array) -> jax.Array:
    """Returns X^T X, (*stack, k, k), for X (*stack, n, k)."""
    return jnp.einsum("...nk,...nl->...kl", columns, columns, precision=HIGHEST)


def orthonormalize(columns: jax.Array) -> jax.Array:
    """Returns Q (*stack, n, k), Q^T Q = I, whose leading columns span those of X.

    See :func:`nearly_orthonormal`, to a tolerance of 1e-5.
    """
    return nearly_orthonormal(columns, TOLERANCE)[0]


def nearly_orthonormal(
    columns: jax.Array, tolerance: float
) -> tuple[jax.Array, jax.Array]:
    r"""Returns Q (*stack, n, k) and Q^T Q, Q's leading columns spanning those of X.

    Shifted Cholesky-QR, repeated until the largest entry e of |Q^T Q - I| is at most
    ``tolerance``; the shift s fades with e:

    .. math::
        L L^\top = X^\top X + s I, \quad X \leftarrow X L^{-\top}, \quad
        s = 4 \epsilon \, \mathrm{tr}(X^\top X) \min(e, 1)

    Products with the (k, k) inverse factor are all that touches the long axis, so a
    mesh sharded along n exchanges k * k numbers a pass. Matrices of the stack that do
    not get there, rank-deficient ones above all, take Householder QR, which completes
    them by directions of its own. Columns that are not finite stay so.

    Cost: 2 n k^2 multiplications a pass and n k^2 more; none, one or two passes as a
    rule.

    References:
        Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
        ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020. Their
        shift is a bound for the worst case; the one here is a few units of rounding,
        with QR behind it.
    """
    norms = jnp.linalg.norm(columns, axis=-2, keepdims=True)
    columns = columns / jnp.where(norms > 0, norms, 1)

    def is_done(products):
        return _error(products) <= tolerance

    def needs_pass(carry):
        passes, _, products = carry
        return (passes < MAX_PASSES) & ~jnp.all(is_done(products))

    def one_pass(carry):
        passes, q, products = carry
        # Matrices that are done are left alone: each gets what it would get by itself.
        done = is_done(products)[..., None, None]
        q_next = jnp.where(done, q, _cholesky_pass(q, products))
        return passes + 1, q_next, gram(q_next)

    start = (jnp.int32(0), columns, gram(columns))
    _, q, products = jax.lax.while_loop(needs_pass, one_pass, start)
    done = is_done(products)

    def with_fallback():
        chosen = jnp.where(done[..., None, None], q, jnp.linalg.qr(columns)[0])
        return chosen, gram(chosen)

    return jax.lax.cond(jnp.all(done), lambda: (q, products), with_fallback)


def _error(products: jax.Array) -> jax.Array:
    """Returns the largest entry of |Q^T Q - I|, (*stack,)."""
    return jnp.max(jnp.abs(products - _eye_like(products)), axis=(-1, -2))


def _eye_like(products: jax.Array) -> jax.Array:
    eye = jnp.eye(products.shape[-1], dtype=products.dtype)
    return jnp.broadcast_to(eye, products.shape)


def _cholesky_pass(columns: jax.Array, products: jax.Array) -> jax.Array:
    trace = jnp.trace(products, axis1=-2, axis2=-1)
    shift = 4 * jnp.finfo(products.dtype).eps * trace * jnp.minimum(_error(products), 1)
    shifted = products + shift[..., None, None] * _eye_like(products)
    inverse = inverse_factor(shifted)
    return jnp.einsum("...nk,...lk->...nl", columns, inverse, precision=HIGHEST)


def inverse_factor(products: jax.Array) -> jax.Array:
    """Returns L^-1 of the Cholesky factor L L^T, (*stack, k, k)."""
    factor = jnp.linalg.cholesky(products)
    return jax.scipy.linalg.solve_triangular(factor, _eye_like(factor), lower=True)
