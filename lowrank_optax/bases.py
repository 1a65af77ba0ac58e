"""One gradient matrix -> one basis of its projected side, ordered by energy.

A basis rule is an object with ``compute``; ``range_finder`` and ``exact_svd`` make
them. All of them work on stacks of oriented gradients A (*stack, a, b) and return
columns that span a subspace of the b-side.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lowrank_optax.orthonormal import HIGHEST, gram, orthonormalize

# Of the intermediate basis of the a-side: its span is what counts, and this is the
# relative error that it puts on the energies.
LEFT_TOLERANCE = 1e-2


class Factor(NamedTuple):
    """A basis and what it captures.

    Attributes:
        columns: Orthonormal basis P, most energetic column first; (*stack, b, r).
        energies: Share of A's squared Frobenius norm that each column captures, at
            least, largest first; (*stack, r).
    """

    columns: jax.Array
    energies: jax.Array


class BasisRule(Protocol):
    """What ``scale_by_low_rank`` asks of a basis."""

    def compute(
        self, matrix: jax.Array, previous: jax.Array, keys: jax.Array
    ) -> Factor:
        """Returns the basis of r columns for A (*stack, a, b), A of any finite scale.

        Args:
            matrix: A; (*stack, a, b), float32 or wider, finite.
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
        self, matrix: jax.Array, previous: jax.Array, keys: jax.Array
    ) -> Factor:
        """Returns the basis; see :class:`BasisRule`."""
        rank = previous.shape[-1]
        width = min(rank + self.oversample, *matrix.shape[-2:])
        start = gaussian(keys, (matrix.shape[-1], width), matrix.dtype)
        if self.warm_start:
            in_use = jnp.any(previous != 0, axis=-2, keepdims=True)
            warm = jnp.where(in_use, previous.astype(matrix.dtype), start[..., :rank])
            start = jnp.concatenate([warm, start[..., rank:]], axis=-1)
        sketch = _half_step(matrix, start)
        for _ in range(self.power_iterations):
            sketch = _half_step(matrix, orthonormalize(sketch))
        return _ordered(sketch, rank, _total(matrix))


def range_finder(
    oversample: int = 8, power_iterations: int = 0, warm_start: bool = False
) -> RangeFinder:
    r"""Basis by a randomized range finder, ordered by the energy it captures.

    For an oriented gradient A (a, b), rank r and k = min(r + oversample, a, b):

    .. math::
        \Omega \in R^{b \times k} \text{ Gaussian}, \quad
        S = \mathrm{orth}(A \Omega), \quad Y = A^\top S, \quad
        Y^\top Y = V \Lambda V^\top, \quad P = Y V \Lambda^{-1/2}

    and P's first r columns are the basis: the leading right singular vectors of
    S^T A. Each power iteration replaces Omega by orth(Y) and repeats. The energies are
    the leading entries of Lambda divided by the squared Frobenius norm of A: what S^T A
    has along each column, at most what A has.

    Cost: 2 (1 + power_iterations) products with A, each a * b * k multiplications, and
    one eigendecomposition k x k. Over a mesh at most (a + b) k + O(k^2) numbers move a
    half step; A itself never does.

    Args:
        oversample: Directions beyond the rank that are sketched, then dropped; >= 0.
        power_iterations: Repetitions with the found subspace; >= 0. Each one sharpens
            the subspace where singular values decay slowly.
        warm_start: Start from the columns in use and fill up with Gaussian ones, so
            that the basis follows the gradients of many steps and not of one.

    Raises:
        ValueError: If a count is negative.

    Example:
        A gradient of rank 2 is found exactly:

        >>> u, v = jax.random.normal(jax.random.key(0), (2, 16, 2))
        >>> keys = jax.random.key(1)
        >>> found = range_finder().compute(u @ v.T, jnp.zeros((16, 4)), keys)
        >>> residual = u @ v.T - u @ v.T @ found.columns @ found.columns.T
        >>> bool(jnp.linalg.norm(residual) < 1e-5 * jnp.linalg.norm(u @ v.T))
        True

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.4 and 5.1. AdaRankGrad's
        Algorithm 1 (SSRF) is orth(A^T Omega), without an order of its columns; ordering
        them costs a second product with A, and spending that product as above instead
        gives half a power iteration for nothing.
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
        self, matrix: jax.Array, previous: jax.Array, keys: jax.Array
    ) -> Factor:
        """Returns the basis; see :class:`BasisRule`."""
        del keys
        rank = previous.shape[-1]
        _, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        columns = jnp.swapaxes(right, -1, -2)[..., :rank]
        total = _total(matrix)[..., None]
        return Factor(columns, values[..., :rank] ** 2 / total)


def exact_svd() -> ExactSVD:
    """Basis of the leading singular vectors by a full SVD, as GaLore computes it.

    Cost: O(a b min(a, b)) operations, hundreds of times those of
    :func:`range_finder` at the sizes of language models, and over a mesh the whole
    gradient is gathered on every device. For reproducing GaLore, and as an oracle.
    """
    return ExactSVD()


def gaussian(keys: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Returns standard normal matrices, one per key; (*keys.shape, *shape)."""
    flat = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys.reshape(-1))
    return flat.reshape(*keys.shape, *shape)


def _half_step(matrix: jax.Array, start: jax.Array) -> jax.Array:
    """Returns Y = A^T orth(A start), (*stack, b, k)."""
    image = jnp.einsum("...ab,...bk->...ak", matrix, start, precision=HIGHEST)
    left = orthonormalize(image, tolerance=LEFT_TOLERANCE)
    return jnp.einsum("...ab,...ak->...bk", matrix, left, precision=HIGHEST)


def _ordered(sketch: jax.Array, rank: int, total: jax.Array) -> Factor:
    """Returns the leading left singular vectors of Y (*stack, b, k), and energies."""
    values, vectors = jnp.linalg.eigh(gram(sketch))
    # eigh sorts upward.
    values, vectors = values[..., ::-1][..., :rank], vectors[..., ::-1][..., :rank]
    columns = jnp.einsum("...bk,...kr->...br", sketch, vectors, precision=HIGHEST)
    energies = jnp.maximum(values, 0) / total[..., None]
    # Columns below sqrt(eps) of the largest are rounding until they are made
    # orthonormal; the factor is triangular, so the order of the columns stays.
    return Factor(orthonormalize(columns), energies)


def _total(matrix: jax.Array) -> jax.Array:
    """Returns the squared Frobenius norm, never zero: it divides."""
    tiny = jnp.finfo(matrix.dtype).tiny
    return jnp.maximum(jnp.sum(matrix**2, axis=(-1, -2)), tiny)
