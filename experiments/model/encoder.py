"""BERT and RoBERTa in Flax NNX: layers created stacked, scanned and rematerialized.

The parameters are a plain nested dict of arrays, ready for Optax and Orbax:

    {"embeddings": {"word": (V, d), "position": (P, d), "segment": (S, d),
                    "norm": {"scale": (d,), "bias": (d,)}},
     "blocks": {"attention": {"query": {"kernel": (L, d, d), "bias": (L, d)},
                              "key", "value", "output": like query},
                "attention_norm": {"scale": (L, d), "bias": (L, d)},
                "mlp": {"up": {"kernel": (L, d, f), "bias": (L, f)},
                        "down": {"kernel": (L, f, d), "bias": (L, d)}},
                "mlp_norm": {"scale": (L, d), "bias": (L, d)}},
     "pooler": {"kernel": (d, d), "bias": (d,)},
     "classifier": {"kernel": (d, C), "bias": (C,)}}

V is the vocabulary, P the rows of the position table, S the kinds of segments, d the
hidden size, f the intermediate size, L the layers, C the labels. Kernels come input
first, y = x @ W + b. The pooler of a RoBERTa is the first layer of its head.

References:
    Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Liu et al.,
    `RoBERTa <https://arxiv.org/abs/1907.11692>`_, 2019.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.errors import UserError
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.layers import are_apart, create_layers, run_layers
from experiments.model.linear import Linear
from experiments.model.rows import for_table, from_table, keep_rows

Params = dict[str, Any]


def init_encoder(config: EncoderConfig, key: jax.Array) -> Params:
    """Draws the parameters; also runs under :func:`jax.eval_shape`.

    Embeddings and kernels are normal with standard deviation 0.02, norm scales are one,
    biases zero.

    Args:
        config: The model.
        key: A key of :func:`jax.random.key`.

    Returns:
        The tree in this module's docstring, in ``config.param_dtype``.
    """
    state = nnx.state(Encoder(config, rngs=nnx.Rngs(key)), nnx.Param)
    return nnx.to_pure_dict(state)


def apply_encoder(
    config: EncoderConfig,
    params: Params,
    tokens: jax.Array | np.ndarray,
    mask: jax.Array | np.ndarray,
    segments: jax.Array | np.ndarray | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes the logits of sequences that are padded at their end.

    Args:
        config: The model.
        params: The tree of :func:`init_encoder`, its layers in stacks or
            :func:`experiments.model.layers.apart`.
        tokens: (B, T) integers in [0, V), T at most ``config.max_positions``; any other
            token gives logits of NaN.
        mask: (B, T), true or 1 for a token, false or 0 for padding. What stands in the
            padding, and how long it is, does not change the logits.
        segments: (B, T) integers in [0, S). None: all 0. A RoBERTa has segment 0 alone,
            and ignores them.
        key: A key of :func:`jax.random.key` for dropout. None: nothing is dropped.

    Returns:
        (B, C) float32 logits; with C = 1 the prediction of a regression.

    Raises:
        UserError: If the sequences are longer than the model's positions.
    """
    length = tokens.shape[1]
    if length > config.max_positions:
        raise UserError(
            f"model: sequences have {length} tokens, and the model has "
            f"{config.max_positions} positions; give a smaller max_length"
        )
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask) > 0
    if segments is None or config.kind == "roberta":
        segments = jnp.zeros_like(tokens)
    scanned = not are_apart(params)
    abstract = nnx.eval_shape(
        lambda: Encoder(config, rngs=nnx.Rngs(0), scanned=scanned)
    )
    model = nnx.merge(nnx.graphdef(abstract), params)
    return model(tokens, mask, jnp.asarray(segments), key)


class Encoder(nnx.Module):
    """Embeddings, L blocks in a stack or apart, pooler of the first token, and head."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, scanned: bool = True):
        self.config = config

        def create(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        hidden = config.hidden_size
        self.embeddings = Embeddings(config, rngs=rngs)
        self.blocks = create_layers(create, config.num_layers, rngs, scanned=scanned)
        self.pooler = _linear(config, rngs, hidden, hidden)
        self.classifier = _linear(config, rngs, hidden, config.num_labels, "float32")

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        segments: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        """Maps (B, T) tokens to (B, C) float32 logits."""
        config = self.config
        # As in the LLaMA: the kernels' outputs are kept, but not the T x T scores.
        kernel_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if config.remat else kernel_products

        def call(hidden, block, mask, key):
            return block(hidden, mask, key)

        embedded_with, blocks_with, *pooled_with = _split(key, 4)
        hidden = self.embeddings(tokens, segments, embedded_with)
        layer_keys = None if key is None else _split(blocks_with, config.num_layers)
        hidden = run_layers(call, hidden, self.blocks, mask, layer_keys, policy=policy)
        first = hidden.reshape(*tokens.shape, -1)[:, 0]
        if config.kind == "roberta":
            first = _dropped(first, config.classifier_dropout, pooled_with[0])
        pooled = jnp.tanh(self.pooler(first))
        pooled = _dropped(pooled, config.classifier_dropout, pooled_with[1])
        return self.classifier(pooled)


class Embeddings(nnx.Module):
    """norm(word + position + segment), (B, T) to (B T, d)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word = _table(config, rngs, config.vocab_size)
        self.position = _table(config, rngs, config.position_rows)
        self.segment = _table(config, rngs, config.type_vocab_size)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, tokens, segments, key):
        config = self.config
        places = config.first_position + jnp.arange(tokens.shape[1])
        total = (
            _looked_up(self.word, for_table(tokens))
            + _looked_up(self.position, places)
            + _looked_up(self.segment, for_table(segments))
        )
        # x is one matrix here and in the blocks. For a (B, T, n) operand XLA's CPU
        # backend transposes the cotangent in every kernel's gradient.
        flat = from_table(total.reshape(-1, config.hidden_size))
        normed = self.norm(flat).astype(config.compute_dtype)
        return _dropped(normed, config.hidden_dropout, key)


class Block(nnx.Module):
    """x = norm(x + attention(x)), then x = norm(x + mlp(x)), on x of shape (B T, d)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dropout = config.hidden_dropout
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.mlp_norm = _layer_norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None):
        scores_with, mixed_with, mlp_with = _split(key, 3)
        mixed = _dropped(self.attention(x, mask, scores_with), self.dropout, mixed_with)
        x = keep_rows(self.attention_norm(x + mixed).astype(x.dtype))
        added = _dropped(self.mlp(x), self.dropout, mlp_with)
        return keep_rows(self.mlp_norm(x + added).astype(x.dtype))


class Attention(nnx.Module):
    """Attention to the tokens of a sequence, (B T, d) to (B T, d)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        hidden = config.hidden_size
        self.query = _linear(config, rngs, hidden, hidden)
        self.key = _linear(config, rngs, hidden, hidden)
        self.value = _linear(config, rngs, hidden, hidden)
        self.output = _linear(config, rngs, hidden, hidden)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None):
        query, keys, value = (
            layer(x).reshape(*mask.shape, -1, self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        scores = jnp.einsum(
            "bthi,bshi->bhts", query, keys, preferred_element_type=jnp.float32
        )
        # A row that is padding alone has no score left; the smallest number keeps its
        # softmax finite.
        least = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, None], scores * self.head_dim**-0.5, least)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        weights = _dropped(weights, self.dropout, key)
        mixed = jnp.einsum("bhts,bshi->bthi", weights, value)
        return self.output(mixed.reshape(x.shape))


class Mlp(nnx.Module):
    """down(gelu(up(x))) with the exact gelu, (B T, d) to (B T, d)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = _linear(config, rngs, hidden, inner)
        self.down = _linear(config, rngs, inner, hidden)

    def __call__(self, x: jax.Array):
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


def _table(config, rngs, rows):
    draw = nnx.initializers.normal(0.02)
    shape = (rows, config.hidden_size)
    return nnx.Param(draw(rngs.params(), shape, jnp.dtype(config.param_dtype)))


def _looked_up(table, rows):
    # Sums are in float32 whatever the tables' dtype, as the norm behind them.
    return jnp.take(table[...], rows, axis=0).astype(jnp.float32)


def _linear(config, rngs, inputs, outputs, compute_dtype=None):
    return Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(compute_dtype or config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _layer_norm(config, rngs):
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        # E x^2 - (E x)^2 loses digits, and transformers does not compute it so.
        use_fast_variance=False,
        rngs=rngs,
    )


def _dropped(x, rate, key):
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def _split(key, count):
    """Returns ``count`` keys, each None if the key is."""
    return [None] * count if key is None else jax.random.split(key, count)
