"""LLaMA in Flax NNX: layers created stacked, scanned and rematerialized.

The parameters are a plain nested dict of arrays, ready for Optax and Orbax:

    {"embedding": (V, d),
     "blocks": {"attention_norm": (L, d), "mlp_norm": (L, d),
                "attention": {"query": (L, d, H·h), "key": (L, d, K·h),
                              "value": (L, d, K·h), "output": (L, H·h, d)},
                "mlp": {"gate": (L, d, f), "up": (L, d, f), "down": (L, f, d)}},
     "norm": (d,),
     "head": (d, V)}          # absent with tied embeddings

V is the vocabulary, d the hidden size, f the intermediate size, L the layers, H and K
the query and key/value heads, h = d / H. Kernels come input first, y = x @ W.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.model.layers import are_apart, create_layers, run_layers
from experiments.model.linear import linear
from experiments.model.rows import for_table, from_table, keep_rows
from experiments.model.shape import LlamaConfig

Params = dict[str, Any]
# cos and sin.
Rotation = tuple[jax.Array, jax.Array]
# Of rotated queries (B, T, H, h), rotated keys and values (B, T, K, h): what the values
# mix to, (B, T, H, h), and anything that the caller wants to keep.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Draws the parameters; also runs under :func:`jax.eval_shape`.

    Embedding, head and kernels are normal with standard deviation 0.02. The kernels
    ``output`` and ``down`` write to the residual stream, and have 0.02 / √(2 L). The
    stream's variance then does not grow with depth (GPT-2's rule). Norm scales are one.

    Args:
        config: The model.
        key: A key of :func:`jax.random.key`.

    Returns:
        The tree in this module's docstring, in ``config.param_dtype``.
    """
    state = nnx.state(Llama(config, rngs=nnx.Rngs(key)), nnx.Param)
    return nnx.to_pure_dict(state)


def apply(
    config: LlamaConfig, params: Params, tokens: jax.Array | np.ndarray
) -> jax.Array:
    """Computes the logits of the next token at every position.

    Args:
        config: The model.
        params: The tree of :func:`init_params`, its layers in stacks or
            :func:`experiments.model.layers.apart`.
        tokens: (B, T) integers in [0, V); any other gives logits of NaN.

    Returns:
        (B, T, V) float32 logits; position t depends on tokens 0..t only.
    """
    return module_of(config, params)(jnp.asarray(tokens))


def module_of(config: LlamaConfig, params: Params) -> "Llama":
    """Returns the module that holds the parameters."""
    scanned = not are_apart(params)
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), scanned=scanned))
    return nnx.merge(nnx.graphdef(abstract), params)


def rotation_of(config: LlamaConfig, positions: jax.Array) -> Rotation:
    """Returns cos and sin, (..., T, 1, h / 2), of positions (..., T) by frequency."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


class Llama(nnx.Module):
    """Token embedding, L blocks stacked on axis 0 or apart, final norm and head."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, scanned: bool = True):
        self.config = config

        def create(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = _kernel(config, rngs, (vocab, hidden))
        self.blocks = create_layers(create, config.num_layers, rngs, scanned=scanned)
        self.norm = _scale(config)
        if not config.tie_embeddings:
            self.head = _kernel(config, rngs, (hidden, vocab))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (B, T) integers to (B, T, V) float32 logits."""
        config = self.config
        # Without remat the kernels' outputs are kept, but not the T x T scores. Storing
        # scores takes longer than computing them again, even on a CPU.
        kernel_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if config.remat else kernel_products

        def call(hidden, block, rotation, _):
            return block(hidden, rotation)[0]

        rotation = rotation_of(config, jnp.arange(tokens.shape[1], dtype=jnp.float32))
        hidden = self.embed(tokens)
        return self.logits(
            run_layers(call, hidden, self.blocks, rotation, (), policy=policy)
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns what the first block reads, (B, T, d), of (B, T) integers."""
        hidden = jnp.take(self.embedding[...], for_table(tokens), axis=0)
        return from_table(hidden.astype(self.config.compute_dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps what the last block writes, (B, T, d), to (B, T, V) float32 logits."""
        config = self.config
        hidden = _rms_norm(hidden, self.norm[...], config.rms_norm_eps)
        head = self.embedding[...].T if config.tie_embeddings else self.head[...]
        return linear(hidden, head, jnp.float32)


def _attend_causally(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True), None


class Block(nnx.Module):
    """x += attention(norm(x)), then x += mlp(norm(x)), on x of shape (B, T, d)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.eps = config.rms_norm_eps
        self.attention_norm = _scale(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _scale(config)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend = _attend_causally
    ):
        """Returns the new x, and what ``attend`` keeps."""
        normed = _rms_norm(x, self.attention_norm[...], self.eps)
        mixed, kept = self.attention(normed, rotation, attend)
        x = keep_rows(x + mixed)
        x = x + self.mlp(_rms_norm(x, self.mlp_norm[...], self.eps))
        return keep_rows(x), kept


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, (B, T, d) to (B, T, d)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.query = _kernel(config, rngs, (hidden, hidden))
        self.key = _kernel(config, rngs, (hidden, kv))
        self.value = _kernel(config, rngs, (hidden, kv))
        self.output = _kernel(config, rngs, (hidden, hidden), writes_residual=True)

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Attend):
        """Returns the output, and what ``attend`` keeps."""
        query, key, value = (
            linear(x, kernel[...]).reshape(*x.shape[:2], -1, self.head_dim)
            for kernel in (self.query, self.key, self.value)
        )
        mixed, kept = attend(_rotate(query, rotation), _rotate(key, rotation), value)
        return linear(mixed.reshape(x.shape), self.output[...]), kept


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), (B, T, d) to (B, T, d)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate = _kernel(config, rngs, (hidden, inner))
        self.up = _kernel(config, rngs, (hidden, inner))
        self.down = _kernel(config, rngs, (inner, hidden), writes_residual=True)

    def __call__(self, x: jax.Array):
        gate, up = linear(x, self.gate[...]), linear(x, self.up[...])
        return linear(jax.nn.silu(gate) * up, self.down[...])


def _kernel(config, rngs, shape, *, writes_residual=False):
    std = 0.02 / (2 * config.num_layers) ** 0.5 if writes_residual else 0.02
    init = nnx.initializers.normal(std)
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(config.param_dtype)))


def _scale(config):
    return nnx.Param(jnp.ones(config.hidden_size, jnp.dtype(config.param_dtype)))


def _rms_norm(x, scale, eps):
    """Returns x / rms(x) * scale over the last axis in x's dtype; float32 inside."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def _rotate(x, rotation):
    """Rotates the pairs (i, i + h / 2) of (B, T, heads, h): Hugging Face's order."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
