"""Newton-Schulz: the orthogonal factor of each matrix of a stack, on any mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrix.shares import in_shares
from lowrank_optax.rules.orthonormal import HIGHEST

EPS = 1e-8  # optax.contrib.scale_by_muon's


def orthogonalized(matrices: jax.Array, ns_steps: jax.typing.ArrayLike) -> jax.Array:
    """Returns orth(X), orth(U S V^T) = U V^T, for a stack X of any dtype.

    On a mesh each device orthogonalizes its share of whole matrices, and the results
    are redistributed; see :func:`in_shares`.

    Args:
        matrices: X; (*stack, n, m).
        ns_steps: Iterations.
    """
    # With a decay of 0 Muon's momentum is its input: there is no state to keep.
    muon = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        ns_steps=ns_steps,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
    )

    def orthogonal(x: jax.Array) -> Any:
        return muon.update(x, muon.init(x))[0]

    return in_shares(orthogonal, matrices)


def orthogonalized_by_factor(
    matrices: jax.Array, coefficients: jax.Array, ns_steps: jax.typing.ArrayLike
) -> jax.Array:
    """Returns orth(X) of a stack that is shared out, moving less if X is long.

    Newton-Schulz multiplies X (r, a) by polynomials of X X^T, so orth(X) = Q X with Q
    (r, r). Each device makes Q for its share of whole matrices, and all devices get all
    Q. This gathers r^2 numbers a matrix in the place of a r. Q X has X's sharding. It
    costs 2 r^3 flops more at each iteration, and 2 a r^2 on every device.

    Args:
        matrices: X; (*stack, n, m), r the shorter side; float32 or wider. Q enlarges
            roundings of X as the iterations do, up to 485 times for five of them.
        coefficients: Coefficients of Newton-Schulz; (3,).
        ns_steps: Iterations.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = jnp.swapaxes(matrices, -1, -2) if is_tall else matrices
    factor = in_shares(lambda x: _factor(x, coefficients, ns_steps), wide, to_all=True)
    wide = _exact(factor, wide)
    return jnp.swapaxes(wide, -1, -2) if is_tall else wide


def _factor(
    x: jax.Array, coefficients: jax.Array, ns_steps: jax.typing.ArrayLike
) -> jax.Array:
    """Returns Q (*stack, r, r) with orth(X) = Q X for X (*stack, r, a)."""
    first, second, third = coefficients.astype(x.dtype)
    one = jnp.eye(x.shape[-2], dtype=x.dtype)
    scale = 1 / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)

    def iteration(_, pair):
        x, q = pair
        gram = x @ jnp.swapaxes(x, -1, -2)
        polynomial = second * gram + third * gram @ gram
        return first * x + polynomial @ x, first * q + _exact(polynomial, q)

    return jax.lax.fori_loop(
        0, ns_steps, iteration, (scale * x, scale * one), unroll=True
    )[1]


_exact = functools.partial(jnp.matmul, precision=HIGHEST)
