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

    bfloat16 has 8 bits of precision: an update below 1/512 of its parameter vanishes
    when the sum is rounded to nearest. Here, of the two neighbours a <= p + u <= b, b
    is taken with probability (p + u - a) / (b - a), so that

    .. math:: E[\mathrm{round}(p + u)] = p + u

    The last transformation of a chain: its updates are float32, the difference to the
    rounded parameter, and ``optax.apply_updates`` gives that parameter exactly.
    Compiled with it in one step, no float32 array of them is made. Leaves of other
    dtypes pass unchanged.

    A draw is a function of the seed, the leaf's path and the count of updates: resuming
    repeats it bit for bit. Cost: 16 random bits per value and update.

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
                "stochastic_rounding rounds parameters: give update params too, "
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

    What bfloat16 holds exactly, infinities and not-a-numbers among it, stays; a value
    beyond the largest one may become infinite.

    Args:
        values: Float32.
        key: Of the draw.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    # The lower half is what bfloat16 lacks: it carries over with its own probability.
    carried = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    kept = jnp.where(jnp.isfinite(values), rounded, values)
    return kept.astype(jnp.bfloat16)
