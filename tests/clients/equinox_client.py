"""Equinox: layers stacked by ``filter_vmap``, ``filter_jit``, its serialisation."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from tests.clients.placement import begun, placed_like
from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Client,
    Loop,
    cross_entropy,
    matrices,
    stacked,
    under,
)


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        sizes = {"qk_size": HEAD_DIM, "vo_size": HEAD_DIM}
        biases = {"use_query_bias": True, "use_value_bias": True}
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, WIDTH, **sizes, **biases, key=first
        )
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=second)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(x)


class Model(eqx.Module):
    """A scanned transformer with a convolution before its head."""

    embedding: eqx.nn.Embedding
    layers: Block
    conv: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.layers = eqx.filter_vmap(Block)(jax.random.split(keys[1], LAYERS))
        self.conv = eqx.nn.Conv1d(WIDTH, WIDTH, 3, padding=((2, 0),), key=keys[2])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[3])

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def layer(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(layer, jax.vmap(self.embedding)(tokens), arrays)
        return jax.vmap(self.head)(x + jax.nn.relu(self.conv(x.T).T))


@eqx.filter_jit
def train_step(model, state, optimizer, tokens, targets):
    @eqx.filter_value_and_grad
    def loss(model):
        return cross_entropy(jax.vmap(model)(tokens), targets)

    value, gradients = loss(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    return eqx.apply_updates(model, updates), state, value


class EquinoxLoop(Loop):
    @property
    def params(self):
        return eqx.filter(self.parts[0], eqx.is_inexact_array)

    def save(self, directory: Path):
        eqx.tree_serialise_leaves(directory / "run.eqx", self.parts)

    def restore(self, directory: Path):
        found = eqx.tree_deserialise_leaves(directory / "run.eqx", self.parts)
        self.parts = placed_like(found, self.parts)


LAYER = {
    "norm/weight": None,
    "norm/bias": None,
    "attention/query_proj/weight": matrices(WIDTH, INNER),
    "attention/query_proj/bias": None,
    "attention/key_proj/weight": matrices(WIDTH, INNER),
    "attention/value_proj/weight": matrices(WIDTH, INNER),
    "attention/value_proj/bias": None,
    "attention/output_proj/weight": matrices(INNER, WIDTH),
    "mlp/layers/0/weight": matrices(WIDTH, HIDDEN),
    "mlp/layers/0/bias": None,
    "mlp/layers/1/weight": matrices(HIDDEN, WIDTH),
    "mlp/layers/1/bias": None,
}
# Equinox's convolutions are (output, input, width), with a bias (output, 1).
EXPECTED = {
    "embedding/weight": matrices(VOCABULARY, WIDTH),
    **under("layers", stacked(LAYER, LAYERS)),
    "conv/weight": matrices(3 * WIDTH, WIDTH),
    "conv/bias": None,
    "head/weight": matrices(WIDTH, VOCABULARY),
}


class Equinox(Client):
    expected = EXPECTED

    def trainer(self, optimizer: optax.GradientTransformation, mesh=None, seed=0):
        model = Model(jax.random.key(seed))
        params, static = eqx.partition(model, eqx.is_inexact_array)
        params, state = begun(optimizer, params, mesh)
        parts = eqx.combine(params, static), state
        return EquinoxLoop(train_step, parts, optimizer, mesh)
