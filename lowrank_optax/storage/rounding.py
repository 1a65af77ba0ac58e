"""Stochastic rounding: bfloat16 parameters that small updates still move."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrix.arrays import as_arrays


class StochasticRoundingState(NamedTuple):
    """State of :func:`stochastic_rounding`.

    Attributes:
        count: Updates done; (), int32.
    """

    count: jax.Array


def stochastic_rounding(
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updated bfloat16 parameters up or down at random, right on average.

    bfloat16 has 8 bits of precision: rounded to nearest, an update below 1/512 of its
    parameter vanishes. Here p + u has the two neighbours a <= p + u <= b, and becomes b
    with probability (p + u - a) / (b - a), so that

    .. math:: E[\mathrm{round}(p + u)] = p + u

    Put this transformation last in a chain. Its updates are float32: the difference
    between the rounded parameter and the old one. ``optax.apply_updates`` then gives
    the rounded parameter exactly. A compiled step with both makes no float32 array of
    updates. Leaves of other dtypes pass unchanged.

    A draw is a function of the seed, the leaf's path and the count of updates. A
    resumed run repeats its draws bit for bit. Cost: 16 random bits per value and
    update.

    Args:
        seed: Seed of the draws.

    Returns:
        A transformation whose ``update`` needs ``params``.

    Raises:
        ValueError: In ``update``, without ``params``.

    Example:
        >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
        >>> tx = optax.chain(optax.sgd(1.0), stochastic_rounding())
        >>> grads = {"w": jnp.full(1000, -0.003, jnp.bfloat16)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> mean = optax.apply_updates(params, updates)["w"].mean(dtype=jnp.float32)
        >>> bool(1.0025 < mean < 1.0035)  # nearest: 1.0
        True
    """

    def init(params):
        del params
        return StochasticRoundingState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "stochastic_rounding rounds parameters, and so needs params in update: "
                "optimizer.update(grads, state, params)."
            )
        updates, params = as_arrays(updates), as_arrays(params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def rounded(path, update, param):
            if param.dtype != jnp.bfloat16:
                return update
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            before = param.astype(jnp.float32)
            after = round_to_bfloat16(
                before + update.astype(jnp.float32), jax.random.fold_in(key, name)
            )
            return after.astype(jnp.float32) - before

        new_updates = jax.tree_util.tree_map_with_path(rounded, updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return new_updates, StochasticRoundingState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def round_to_bfloat16(values: jax.Array, key: jax.Array) -> jax.Array:
    """Returns float32 values as bfloat16, each rounded up or down, right on average.

    A value that bfloat16 represents exactly stays as it is, infinities and NaN too. A
    value beyond the largest finite one may become infinite.

    Args:
        values: Values in float32.
        key: Key of the draw.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 lacks the lower 16 bits: they carry into the upper ones with probability
    # (lower bits) / 2^16.
    carried = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    kept = jnp.where(jnp.isfinite(values), rounded, values)
    return kept.astype(jnp.bfloat16)
