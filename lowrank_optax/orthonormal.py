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

    After the first pass e is not measured but bounded, which needs no product: Q Q^T is
    I - s (L L^T)^{-1} and what rounding leaves in the same way, so

    .. math::
        e \le (s + 2 \epsilon \sqrt{k}) \max_i \|(L^{-1})_{i \cdot}\|^2

    Products with the (k, k) inverse factor are all that touches the long axis, so a
    mesh sharded along n exchanges k * k numbers a pass. Matrices of the stack that do
    not get there, rank-deficient ones above all, take Householder QR, which completes
    them by directions of its own. Rows that are not finite stay so.

    Cost: 2 n k^2 multiplications a pass; one pass as a rule.

    References:
        Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
        ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020. Their
        shift is a bound for the worst case; the one here is a few units of rounding,
        with QR behind it.
    """
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows / jnp.where(norms > 0, norms, 1)

    def is_done(products):
        near = jnp.abs(products - _eye_like(products)) <= tolerance
        return jnp.all(near, axis=(-1, -2))

    def needs_pass(carry):
        passes, _, products = carry
        return (passes < MAX_PASSES) & ~jnp.all(is_done(products))

    def one_pass(carry):
        passes, q, products = carry
        # Matrices that are done are left alone: each gets what it would get by itself.
        done = is_done(products)[..., None, None]
        q_next = jnp.where(done, q, _cholesky_pass(q, products)[0])
        return passes + 1, q_next, gram(q_next)

    once, bound = _cholesky_pass(rows, gram(rows))

    def carefully():
        start = (jnp.int32(1), once, gram(once))
        _, q, last = jax.lax.while_loop(needs_pass, one_pass, start)
        done = is_done(last)

        def with_fallback():
            columns, _ = jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))
            return jnp.where(done[..., None, None], q, jnp.swapaxes(columns, -1, -2))

        return jax.lax.cond(jnp.all(done), lambda: q, with_fallback)

    # One pass is nearly always enough, and outside a loop it is not copied about.
    return jax.lax.cond(jnp.all(bound <= tolerance), lambda: once, carefully)


def _eye_like(products: jax.Array) -> jax.Array:
    eye = jnp.eye(products.shape[-1], dtype=products.dtype)
    return jnp.broadcast_to(eye, products.shape)


def _cholesky_pass(rows: jax.Array, products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns Q = L^{-1} X, and for each row a bound of e; (*stack, k)."""
    eye = _eye_like(products)
    rounding = jnp.finfo(products.dtype).eps
    error = jnp.max(jnp.abs(products - eye), axis=(-1, -2))
    trace = jnp.trace(products, axis1=-2, axis2=-1)
    shift = 4 * rounding * trace * jnp.minimum(error, 1)
    factor = jnp.linalg.cholesky(products + shift[..., None, None] * eye)
    inverse = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
    # Not the largest one: XLA's maximum may pass over NaN (see subspace.py).
    spread = shift + 2 * rounding * products.shape[-1] ** 0.5
    bound = spread[..., None] * jnp.sum(inverse**2, axis=-1)
    return jnp.einsum("...kl,...ln->...kn", inverse, rows, precision=HIGHEST), bound
