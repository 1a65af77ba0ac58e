"""Decoding with a key-value cache: one new token at a time, in one compiled loop."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.model.llama import Params, module_of, rotation_of
from experiments.model.shape import LlamaConfig

# Chooses from (B, V) logits the token, (B,), after so many new ones, ().
Choose = Callable[[jax.Array, jax.Array], jax.Array]


class Cache(NamedTuple):
    """Rotated keys, and values, of the tokens so far.

    Attributes:
        keys: (L, B, S, K, h) in the compute dtype, for S tokens of L layers.
        values: Like ``keys``.
        begin: Place in S of each sequence's first token; (B,), int32. Sequences of
            different lengths are padded on the left, so that all end at one place.
        used: Places in S that hold tokens or padding; (), int32.
    """

    keys: jax.Array
    values: jax.Array
    begin: jax.Array
    used: jax.Array


def empty_cache(config: LlamaConfig, begin: jax.Array, places: int) -> Cache:
    """Returns a cache for sequences of ``places`` tokens, padding included.

    Args:
        config: The model.
        begin: How many places of padding are before each sequence; (B,) int32.
        places: S.
    """
    heads = (config.num_kv_heads, config.head_dim)
    shape = (config.num_layers, begin.size, places, *heads)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return Cache(zeros, zeros, begin, jnp.int32(0))


def extend(
    config: LlamaConfig, params: Params, cache: Cache, tokens: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads the next T tokens of each sequence.

    Args:
        config: The model.
        params: Its parameters.
        cache: What has been read; used + T <= S.
        tokens: (B, T) int32; any token may stand where there is padding.

    Returns:
        (B, V) float32 logits of the token after these, and the cache with them.
    """
    model = module_of(config, params)
    places = jnp.arange(cache.keys.shape[2])
    new = cache.used + jnp.arange(tokens.shape[1])
    # (B, T, S): the places that each new token sees.
    visible = (places <= new[:, None]) & (places >= cache.begin[:, None, None])
    rotation = rotation_of(config, new - cache.begin[:, None])

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def run_blocks(carry, block, layer):
        hidden, keys, values = carry

        def attend(query, key, value):
            at = (layer, 0, cache.used, 0, 0)
            # In the loop's carry, and so in place: a step writes its own tokens only.
            kept = tuple(
                jax.lax.dynamic_update_slice(old, x[None].astype(old.dtype), at)
                for old, x in ((keys, key), (values, value))
            )
            mixed = jax.nn.dot_product_attention(
                query, *(x[layer] for x in kept), mask=visible[:, None]
            )
            return mixed, kept

        hidden, kept = block(hidden, rotation, attend)
        return hidden, *kept

    carry = (model.embed(tokens), cache.keys, cache.values)
    layers = jnp.arange(config.num_layers)
    hidden, keys, values = run_blocks(carry, model.blocks, layers)
    used = cache.used + tokens.shape[1]
    cache = cache._replace(keys=keys, values=values, used=used)
    # The head would take a fifth of a prompt's time, and V numbers for each token.
    return model.logits(hidden[:, -1:])[:, 0], cache


def decode(
    config: LlamaConfig,
    params: Params,
    prompts: jax.Array,
    begin: jax.Array,
    choose: Choose,
    limit: jax.Array,
    stop_ids: jax.Array,
    most: int,
) -> jax.Array:
    """Continues padded prompts until each has met an end, or ``limit`` tokens.

    Args:
        config: The model.
        params: Its parameters.
        prompts: (B, P) int32, padded on the left.
        begin: Place of each prompt's first token; (B,) int32.
        choose: Chooses the next tokens from their logits.
        limit: New tokens of a sequence; () int32, at least 1 and at most ``most``.
        stop_ids: Tokens that end a sequence; (n,) int32.
        most: Columns of the result; static, so that limits share a program.

    Returns:
        (B, most) int32. What stands behind a sequence's first end, or from column
        ``limit`` on, has no meaning.
    """

    def write(written, state, logits, cache):
        tokens, ended = state
        token = choose(logits, written).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, written))
        ended |= (token[:, None] == stop_ids).any(axis=-1)
        return written + 1, (tokens, ended), token[:, None], cache

    def goes_on(loop):
        written, (_, ended), _, _ = loop
        return (written < limit) & ~ended.all()

    def step(loop):
        written, state, token, cache = loop
        return write(written, state, *extend(config, params, cache, token))

    count, length = prompts.shape
    state = (jnp.zeros((count, most), jnp.int32), jnp.zeros(count, bool))
    cache = empty_cache(config, begin, length + most)
    first = write(jnp.int32(0), state, *extend(config, params, cache, prompts))
    _, (tokens, _), _, _ = jax.lax.while_loop(goes_on, step, first)
    return tokens
