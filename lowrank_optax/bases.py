"""One gradient matrix -> one basis of its projected side, ordered by energy.

A basis rule is an object with ``compute``; ``range_finder`` and ``exact_svd`` make
them. All of them work on stacks of oriented gradients A (*stack, a, b) and return
columns that span a subspace of the b-side.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lowrank_optax.orthonormal import (
    HIGHEST,
    gram,
    inverse_factor,
    nearly_orthonormal,
    orthonormalize,
)

# How far Q^T Q may be from I where a (k, k) factor makes up for it.
NEARLY = 3e-2


class Factor(NamedTuple):
    """A basis and what it captures.

    Attributes:
        columns: Orthonormal basis P, most energetic column first; (*stack, b, r).
        energies: Share of A's squared Frobenius norm that each column captures,
            largest first; (*stack, r).
    """

    columns: jax.Array
    energies: jax.Array


class BasisRule(Protocol):
    """What ``scale_by_low_rank`` asks of a basis."""

    def compute(
        self,
        matrix: jax.Array,
        scale: jax.Array,
        previous: jax.Array,
        keys: jax.Array,
    ) -> Factor:
        """Returns the basis of r columns for A (*stack, a, b), finite whatever A is.

        Args:
            matrix: A; (*stack, a, b), float32 or wider. The result for a matrix that is
                zero or not finite is not used.
            scale: Largest |entry| of A, 1 where that is zero or not finite; (*stack,).
                Small results are divided by it, so that squares neither overflow nor
                underflow and A is not copied.
            previous: Basis in use, (*stack, b, r); zero columns are not in use. Its
                shape, not a constructor argument, says r.
            keys: One typed PRNG key per matrix; (*stack,).
        """
        ...


@dataclasses.dataclass(frozen=True)
class RangeFinder:
    """See :func:`range_finder`."""

    oversample: int
    power_iterations: int
    warm_start: bool

    def compute(
        self,
        matrix: jax.Array,
        scale: jax.Array,
        previous: jax.Array,
        keys: jax.Array,
    ) -> Factor:
        """Returns the basis; see :class:`BasisRule`."""
        rank = previous.shape[-1]
        width = min(rank + self.oversample, *matrix.shape[-2:])
        start = gaussian(keys, (matrix.shape[-2], width), matrix.dtype)
        if self.warm_start:
            in_use = jnp.any(previous != 0, axis=-2, keepdims=True)
            image = _times(matrix, previous.astype(matrix.dtype), scale)
            warm = jnp.where(in_use, image, start[..., :rank])
            start = jnp.concatenate([warm, start[..., rank:]], axis=-1)
        found, products = _subspace(matrix, start, scale)
        for _ in range(self.power_iterations):
            left = orthonormalize(_times(matrix, found, scale))
            found, products = _subspace(matrix, left, scale)
        return _ordered(matrix, found, products, rank, scale)


def range_finder(
    oversample: int = 8, power_iterations: int = 0, warm_start: bool = False
) -> RangeFinder:
    r"""Basis by a randomized range finder, ordered by the energy it captures.

    For an oriented gradient A (a, b), rank r and k = min(r + oversample, a, b):

    .. math::
        \Omega \in R^{a \times k} \text{ Gaussian}, \quad
        Q = \mathrm{orth}(A^\top \Omega), \quad
        (A Q)^\top A Q = V \Lambda V^\top, \quad P = Q V

    and the first r columns of P are the basis. Each power iteration replaces Q by
    orth(A^T orth(A Q)). The energies are the leading entries of Lambda divided by the
    squared Frobenius norm of A: exactly what each column captures.

    Cost: 2 (1 + power_iterations) products with A, each a * b * k multiplications, and
    one eigendecomposition k x k; a warm start costs one product more. Over a mesh at
    most (a + b) k + O(k^2) numbers move for each two products; A itself never does.

    Args:
        oversample: Directions beyond the rank that are sketched, then dropped; >= 0.
        power_iterations: Repetitions with the found subspace; >= 0. Each one sharpens
            the subspace where singular values decay slowly.
        warm_start: Start from A times the columns in use, filled up with Gaussian
            ones, so that the basis follows the gradients of many steps and not of one.

    Raises:
        ValueError: If a count is negative.

    Example:
        A gradient of rank 2 is found exactly:

        >>> u, v = jax.random.normal(jax.random.key(0), (2, 16, 2))
        >>> keys = jax.random.key(1)
        >>> scale = jnp.max(jnp.abs(u @ v.T))
        >>> found = range_finder().compute(u @ v.T, scale, jnp.zeros((16, 4)), keys)
        >>> residual = u @ v.T - u @ v.T @ found.columns @ found.columns.T
        >>> bool(jnp.linalg.norm(residual) < 1e-5 * jnp.linalg.norm(u @ v.T))
        True

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.1 and 4.4. AdaRankGrad's
        Algorithm 1 (SSRF) is Q, without an order of its columns.
    """
    if oversample < 0 or power_iterations < 0:
        raise ValueError(
            "oversample and power_iterations must be >= 0, got "
            f"{oversample=}, {power_iterations=}."
        )
    return RangeFinder(oversample, power_iterations, warm_start)


@dataclasses.dataclass(frozen=True)
class ExactSVD:
    """See :func:`exact_svd`."""

    def compute(
        self,
        matrix: jax.Array,
        scale: jax.Array,
        previous: jax.Array,
        keys: jax.Array,
    ) -> Factor:
        """Returns the basis; see :class:`BasisRule`."""
        del keys
        rank = previous.shape[-1]
        scaled = _finite(matrix / scale[..., None, None])
        _, values, right = jnp.linalg.svd(scaled, full_matrices=False)
        columns = jnp.swapaxes(right, -1, -2)[..., :rank]
        total = _total(matrix, scale)[..., None]
        return Factor(columns, values[..., :rank] ** 2 / total)


def exact_svd() -> ExactSVD:
    """Basis of the leading singular vectors by a full SVD, as GaLore computes it.

    Cost: O(a b min(a, b)) operations, where :func:`range_finder` takes O(a b k), and
    over a mesh the whole gradient is gathered on every device. For reproducing GaLore,
    and as an oracle.
    """
    return ExactSVD()


def gaussian(keys: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Returns standard normal matrices, one per key; (*keys.shape, *shape)."""
    flat = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys.reshape(-1))
    return flat.reshape(*keys.shape, *shape)


def _times(matrix: jax.Array, columns: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns A columns / scale, (*stack, a, k), finite."""
    image = jnp.einsum("...ab,...bk->...ak", matrix, columns, precision=HIGHEST)
    return _finite(image / scale[..., None, None])


def _subspace(
    matrix: jax.Array, start: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns nearly orthonormal columns Q that span A^T start, and Q^T Q."""
    # A stands last and in its own layout: only small matrices are transposed.
    rows = jnp.einsum("...ak,...ab->...kb", start, matrix, precision=HIGHEST)
    rows = _finite(rows / scale[..., None, None])
    return nearly_orthonormal(jnp.swapaxes(rows, -1, -2), NEARLY)


def _ordered(
    matrix: jax.Array,
    found: jax.Array,
    products: jax.Array,
    rank: int,
    scale: jax.Array,
) -> Factor:
    """Returns the r leading columns of the span of Q (*stack, b, k), and energies."""
    # With Q^T Q = L L^T the columns of Q L^-T are orthonormal; applying L^-1 to the
    # (k, k) products instead of the (b, k) columns is what makes nearly good enough.
    factor = inverse_factor(products)
    inside = gram(_times(matrix, found, scale))
    inside = jnp.einsum(
        "...ik,...kl,...jl->...ij", factor, inside, factor, precision=HIGHEST
    )
    values, vectors = jnp.linalg.eigh(inside)
    # eigh sorts upward.
    values, vectors = values[..., ::-1][..., :rank], vectors[..., ::-1][..., :rank]
    rotation = jnp.einsum("...ki,...kr->...ir", factor, vectors, precision=HIGHEST)
    columns = jnp.einsum("...bk,...kr->...br", found, rotation, precision=HIGHEST)
    energies = jnp.maximum(values, 0) / _total(matrix, scale)[..., None]
    return Factor(orthonormalize(columns), energies)


def _total(matrix: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the squared Frobenius norm of A / scale, never zero: it divides."""
    tiny = jnp.finfo(matrix.dtype).tiny
    squares = (matrix / scale[..., None, None]) ** 2
    return jnp.maximum(jnp.sum(squares, axis=(-1, -2)), tiny)


def _finite(x: jax.Array) -> jax.Array:
    """Returns x with 0 for what is not finite: decompositions may hang on that."""
    return jnp.where(jnp.isfinite(x), x, 0)
