"""One gradient matrix -> one basis of its projected side, ordered by energy.

A basis rule is an object with ``compute``; ``range_finder`` and ``exact_svd`` make such
rules. Every rule takes a stack of oriented gradients A (*stack, a, b), and returns
columns in a subspace of the b-side.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from lowrank_optax.checks import as_count, check_is_static
from lowrank_optax.rules.hashing import hashed_uniform
from lowrank_optax.rules.lapack import one_by_one
from lowrank_optax.rules.orthonormal import HIGHEST, gram, orthonormalize
from lowrank_optax.rules.products import (
    NEARLY,
    image_rows,
    is_usable,
    scaled,
    sketch_rows,
)


class BasisRule(Protocol):
    """The interface of a basis rule for ``scale_by_low_rank``."""

    def compute(
        self,
        matrix: jax.Array,
        previous: jax.Array,
        seeds: jax.Array,
    ) -> jax.Array:
        """Returns P (*stack, b, r) for A (*stack, a, b).

        Columns are orthonormal, ordered by falling energy. Where A has no basis, the
        columns are zero or not finite, and the caller keeps the basis in use.

        Args:
            matrix: A; (*stack, a, b), float32 or wider, with any values, even NaN.
            previous: Basis in use, (*stack, b, r); zero columns are not in use. This
                shape gives r; the rule's constructor does not.
            seeds: A number per matrix, uint32 (*stack,), different at each refresh.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RangeFinder:
    """See :func:`range_finder`."""

    oversample: int
    power_iterations: float
    warm_start: bool

    def compute(
        self,
        matrix: jax.Array,
        previous: jax.Array,
        seeds: jax.Array,
    ) -> jax.Array:
        """Returns the basis; see :class:`BasisRule`."""
        rank = previous.shape[-1]
        width = min(rank + self.oversample, *matrix.shape[-2:])
        products = 1 + round(2 * self.power_iterations)
        if self.warm_start:
            products += products % 2  # an even number starts on the projected side
        length = matrix.shape[-2] if products % 2 else matrix.shape[-1]
        rows = hashed_uniform(seeds, (width, length), matrix.dtype)
        if self.warm_start:
            in_use = jnp.any(previous != 0, axis=-2)[..., None]
            warm = jnp.swapaxes(previous, -1, -2).astype(rows.dtype)
            warm = jnp.where(in_use, warm, rows[..., :rank, :])
            rows = jnp.concatenate([warm, rows[..., rank:, :]], axis=-2)
            rows = orthonormalize(rows, NEARLY)
        product = (sketch_rows if products % 2 else image_rows)(matrix, rows)
        if products % 2 == 0:
            product = sketch_rows(matrix, orthonormalize(scaled(product), NEARLY))

        def power_iteration(_, sketch):
            image = image_rows(matrix, orthonormalize(scaled(sketch), NEARLY))
            return sketch_rows(matrix, orthonormalize(scaled(image), NEARLY))

        iterations = (products - 1) // 2
        product = jax.lax.fori_loop(0, iterations, power_iteration, product)
        rows = scaled(product)
        # Each entry of A is in some sum of the last product, so that NaN shows there.
        return jnp.where(is_usable(product), _leading(rows, rank), 0)


def range_finder(
    oversample: int = 8, power_iterations: float = 0.5, warm_start: bool = False
) -> RangeFinder:
    r"""Basis by a randomized range finder, ordered by the energy in a sketch.

    For an oriented gradient A (a, b), rank r and k = min(r + oversample, a, b), the
    basis has the r leading left singular vectors of a sketch Y:

    .. math::
        \Omega \in R^{a \times k} \text{ uniform on } (-1, 1), \quad
        Y = A^\top \Omega, \quad P = U_r \text{ of } Y = U \Sigma V^\top

    Each power iteration replaces Y by A^T orth(A orth(Y)). Half an iteration is the
    plain randomized SVD of A:

    .. math:: \Omega \in R^{b \times k}, \quad Y = A^\top \mathrm{orth}(A \Omega)

    Without any iteration, the sketch alone orders the columns and selects r of k. The
    sketch is noisy where singular values lie close.

    Cost: 1 + 2 power_iterations products with A, each a * b * k multiplications, and
    one eigendecomposition k x k; a rank by energy costs one product more. Over a mesh a
    product moves at most (a + b) k numbers, each orthonormalisation k^2; A itself never
    moves. The loops have no derivative in reverse mode: to differentiate through
    updates, use ``update(..., refresh=False)``.

    Args:
        oversample: Directions beyond the rank that are sketched, then dropped; >= 0.
        power_iterations: Repetitions with the found subspace; a multiple of 0.5, >= 0.
            Each repetition sharpens the subspace where singular values decay slowly.
        warm_start: Whether Omega starts with the columns in use, and random columns
            fill the rest. The basis then follows the gradients of many steps. A whole
            number of power iterations is raised by half an iteration.

    Raises:
        ValueError: If a count is out of its range.

    Example:
        A gradient of rank 2 is found exactly:

        >>> u, v = jax.random.normal(jax.random.key(0), (2, 16, 2))
        >>> seed = jnp.uint32(1)
        >>> found = range_finder().compute(u @ v.T, jnp.zeros((16, 4)), seed)
        >>> residual = u @ v.T - u @ v.T @ found @ found.T
        >>> bool(jnp.linalg.norm(residual) < 1e-5 * jnp.linalg.norm(u @ v.T))
        True

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.1, 4.4 and 5.1. The
        paper's Omega is Gaussian. Uniform entries work as well, and their draw is
        several times faster. AdaRankGrad's Algorithm 1 (SSRF) is orth(Y), with
        unordered columns.
    """
    oversample = as_count("oversample", oversample, 0)
    check_is_static(
        "power_iterations",
        power_iterations,
        '("power_iterations",)',
        "a program's products depend on it",
    )
    if not power_iterations >= 0 or (2 * power_iterations) % 1:
        raise ValueError(
            f"power_iterations must be a multiple of 0.5, >= 0, got {power_iterations}."
        )
    return RangeFinder(oversample, power_iterations, warm_start)


@dataclasses.dataclass(frozen=True)
class ExactSVD:
    """See :func:`exact_svd`."""

    def compute(
        self,
        matrix: jax.Array,
        previous: jax.Array,
        seeds: jax.Array,
    ) -> jax.Array:
        """Returns the basis; see :class:`BasisRule`."""
        del seeds
        rank = previous.shape[-1]
        right = one_by_one(_right_singular_vectors, scaled(matrix))
        columns = jnp.swapaxes(right, -1, -2)[..., :rank]
        return jnp.where(is_usable(matrix), columns, 0)


def exact_svd() -> ExactSVD:
    """Basis of the leading singular vectors by a full SVD, as in GaLore.

    Cost: O(a b min(a, b)) operations; :func:`range_finder` takes O(a b k). Over a mesh
    every device gathers the whole gradient. Use it to reproduce GaLore, or as an
    oracle.
    """
    return ExactSVD()


def captured_energies(matrix: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns the share of A's squared Frobenius norm in each column, (*stack, r).

    Args:
        matrix: A; (*stack, a, b).
        basis: Orthonormal columns P; (*stack, b, r).
    """
    # Squares of unscaled entries would overflow or underflow.
    peak = jnp.max(jnp.abs(matrix), axis=(-1, -2), keepdims=True)
    peak = jnp.where(peak > 0, peak, 1)
    image = image_rows(matrix, jnp.swapaxes(basis, -1, -2)) / peak
    # The total is a divisor, and so never zero.
    total = jnp.sum((matrix / peak) ** 2, axis=(-1, -2))
    total = jnp.maximum(total, jnp.finfo(matrix.dtype).tiny)
    return jnp.sum(image**2, axis=-1) / total[..., None]


def _right_singular_vectors(matrices: jax.Array) -> jax.Array:
    """Returns V^T (*stack, min(a, b), b) of U S V^T."""
    return jnp.linalg.svd(matrices, full_matrices=False)[2]


def _leading(sketch: jax.Array, rank: int) -> jax.Array:
    """Returns the r leading right singular vectors of Y^T (*stack, k, b), as columns.

    The product squares singular values. Values under 3e-4 of the largest (float32's
    root of epsilon) lose their order; orthonormalize restores their span.
    """
    vectors = one_by_one(lambda x: jnp.linalg.eigh(x)[1], gram(sketch))
    leading = vectors[..., ::-1]  # eigh sorts upward
    rows = jnp.einsum("...kr,...kb->...rb", leading, sketch, precision=HIGHEST)
    return jnp.swapaxes(orthonormalize(rows)[..., :rank, :], -1, -2)
