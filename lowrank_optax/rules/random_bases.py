"""Random bases: functions of a key, drawn when needed and never stored."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RandomBasis:
    """See :func:`gaussian` and :func:`rademacher`.

    Attributes:
        distribution: "gaussian" or "rademacher".
    """

    distribution: str

    def draw(self, keys: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
        """Returns bases P (*keys.shape, b, r); equal keys give equal bases.

        Args:
            keys: One typed PRNG key per matrix; (*stack,).
            shape: (b, r).
            dtype: Dtype of the result.
        """
        sampler = {"gaussian": jax.random.normal, "rademacher": _signs}
        sample = sampler[self.distribution]
        flat = jax.vmap(lambda key: sample(key, shape, dtype))(keys.reshape(-1))
        scaled = flat / jnp.sqrt(jnp.asarray(shape[-1], dtype))
        return scaled.reshape(*keys.shape, *shape)


def gaussian() -> RandomBasis:
    r"""Basis with independent entries N(0, 1/r), so that E[P P^T] = I.

    The lifted gradient G P P^T is an unbiased estimate of G. Its variance is
    (b + 1) / r times the squared norm of G, with b / c in place of b at granularity c.
    At a fixed c r this variance grows with c, contrary to the paper's claim. A draw is
    a function of the seed, the leaf's path, the matrix's place in the stack and the
    number of the refresh. The draw is repeated whenever P is needed: the state holds no
    basis.

    Cost: b * r normal numbers per matrix and update. A refresh needs no gradient.

    References:
        VLoRP (https://arxiv.org/abs/2505.01744), with granularity c; Flora
        (https://arxiv.org/abs/2402.03293).
    """
    return RandomBasis("gaussian")


def rademacher() -> RandomBasis:
    r"""Basis with independent entries +-1/sqrt(r), so that E[P P^T] = I.

    As :func:`gaussian`, and several times faster to draw. The variance is (b - 1) / r
    times the squared norm of G. At a fixed c r this variance falls with c.
    """
    return RandomBasis("rademacher")


def _signs(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Returns +-1, one random bit each."""
    count = shape[0] * shape[1]
    words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32)[None, :]
    bits = (words[:, None] >> places) & 1
    return (2 * bits.reshape(-1)[:count].astype(dtype) - 1).reshape(shape)
