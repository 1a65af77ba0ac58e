"""A basis of columns of the cosine transform, stored as the columns' numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.arrays import blank
from lowrank_optax.rules.products import image_rows, is_usable, scaled

# Columns of Q that exist at one time while energies are computed.
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class DctColumns:
    """See :func:`dct_columns`."""

    def compute(
        self,
        matrix: jax.Array,
        previous: jax.Array,
        seeds: jax.Array,
    ) -> jax.Array:
        """Returns the basis; see :class:`BasisRule`."""
        del seeds
        numbers = self.numbers(matrix, previous.shape[-1])
        return self.columns(numbers, matrix.shape[-1], matrix.dtype)

    def numbers(self, matrix: jax.Array, rank: int) -> jax.Array:
        """Returns the numbers of the r columns with the most energy.

        Args:
            matrix: A; (*stack, a, b), with any values, even NaN.
            rank: r, at most b.

        Returns:
            (*stack, 1, r), int32, ordered by falling energy. Of two columns with the
            same energy the lower number is first. All are -1 where A is zero or not
            finite.
        """
        energies = _energies(scaled(matrix))
        numbers = jax.lax.top_k(energies, rank)[1][..., None, :].astype(jnp.int32)
        return jnp.where(is_usable(matrix), numbers, blank(numbers.dtype))

    def columns(self, numbers: jax.Array, length: int, dtype) -> jax.Array:
        """Returns P (*stack, b, r), the columns with these numbers.

        Args:
            numbers: (*stack, 1, r); a negative number gives a zero column.
            length: b.
            dtype: Dtype of the result.
        """
        return cosine_columns(numbers, length, dtype)


def dct_columns() -> DctColumns:
    r"""Basis of the columns of a fixed cosine transform that capture the most energy.

    Q (b, b) is the orthonormal matrix of the DCT-II, with u_0 = sqrt(1/2) and u_j = 1
    for other j:

    .. math:: Q_{ij} = u_j \sqrt{2 / b} \, \cos(\pi (2 i + 1) j / (2 b))

    For an oriented gradient A (a, b) the basis has the r columns of Q with the largest
    energies, ordered by falling energy:

    .. math:: e_j = \|A q_j\|_2^2, \quad P = (q_{j_1}, \dots, q_{j_r})

    The state holds r column numbers per matrix, int32, in the place of b r floats:
    ``Subspace.basis`` is (\*stack, 1, r). The number -1 stands for a zero column, as
    before the first usable gradient and above the rank. ``dct_columns().columns`` gives
    P from the numbers.

    The choice is the best one among the columns of Q. It captures less energy than as
    many singular vectors do. P_old^T P_new has a single 1 for each column that both
    bases have, and zeros elsewhere: the moments of such a column stay the same.

    Cost: a b^2 multiplications per refresh, and b^2 cosines for all matrices of a
    stack. No decomposition, no draw. Each update takes b r cosines per matrix, because
    P is made again where it is needed. Q never exists as a whole. b is at most 2^19.
    Losses beside a stored basis of equal bytes are in ``docs/results.md``.

    Example:
        A gradient of two columns of Q is found exactly:

        >>> rule = dct_columns()
        >>> q = rule.columns(jnp.array([[5, 2]]), 16, jnp.float32)
        >>> gradient = jnp.ones((8, 1)) * (q[:, 0] + 2 * q[:, 1])
        >>> rule.numbers(gradient, 2)
        Array([[2, 5]], dtype=int32)

    References:
        Modoranu et al., `FFT-based Dynamic Subspace Selection (Trion, DCT-AdamW)
        <https://arxiv.org/abs/2505.17967>`_, 2025. The paper selects anew at every
        update; here a basis is renewed at refreshes. The paper keeps Q, one for each
        size, and has a fast transform for large b. Here P comes from its formula, and
        energies from products with 512 columns of Q at a time.
    """
    return DctColumns()


def cosine_columns(numbers: jax.Array, length: int, dtype) -> jax.Array:
    """Returns columns of the orthonormal DCT-II matrix Q (n, n); (*stack, n, r).

    Angles are reduced as integers, and so are exact up to one rounding: entries are
    within 1e-6 of the formula in float32.

    Args:
        numbers: (*stack, 1, r), integers below n; a negative one gives a zero column.
        length: n, at most 2^19.
        dtype: Dtype of the result.
    """
    shape = (*numbers.shape[:-2], length, numbers.shape[-1])
    odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 2) + 1
    frequencies = jnp.maximum(numbers, 0).astype(jnp.uint32)
    turns = _product_modulo(odd, frequencies, 4 * length)
    cosines = jnp.cos(turns.astype(dtype) * (math.pi / (2 * length)))
    squares = jnp.where(numbers > 0, 2.0, jnp.where(numbers == 0, 1.0, 0.0)) / length
    return cosines * jnp.sqrt(squares).astype(dtype)


def _product_modulo(first: jax.Array, second: jax.Array, modulus: int) -> jax.Array:
    """Returns first * second modulo a number, uint32: whole turns of an angle.

    It is exact for factors up to 2^20 and 2^19 and a modulus up to 2^21.
    """
    high, low = second >> 9, second & 511
    return (((first * high % modulus) << 9) + first * low) % modulus


def _energies(matrix: jax.Array) -> jax.Array:
    """Returns the energies of A (*stack, a, b) in all columns of Q, (*stack, b)."""
    side = matrix.shape[-1]
    width = min(side, _BLOCK)
    count = -(-side // width)
    every = jnp.arange(count * width).reshape(count, 1, width)

    def of_block(numbers):
        columns = cosine_columns(numbers, side, matrix.dtype)
        return jnp.sum(image_rows(matrix, columns.T) ** 2, axis=-1)

    blocks = jnp.moveaxis(jax.lax.map(of_block, every), 0, -2)
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :side]
