"""Equinox: layers stacked by ``filter_vmap``, ``filter_jit``, its serialisation."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax import state_shardings
from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Client,
    Trainer,
    batch,
    cross_entropy,
    matrices,
    on,
    placed_like,
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


class EquinoxTrainer(Trainer):
    def __init__(self, model, state, optimizer, mesh):
        self.model, self.state = model, state
        self.optimizer, self.mesh = optimizer, mesh

    @property
    def params(self):
        return eqx.filter(self.model, eqx.is_inexact_array)

    @property
    def opt_state(self):
        return self.state

    def step(self, index):
        with on(self.mesh):
            self.model, self.state, loss = train_step(
                self.model, self.state, self.optimizer, *batch(index)
            )
        return float(loss)

    def save(self, directory: Path):
        path = directory / "run.eqx"
        eqx.tree_serialise_leaves(path, (self.model, self.state))

    def restore(self, directory: Path):
        path, like = directory / "run.eqx", (self.model, self.state)
        found = eqx.tree_deserialise_leaves(path, like)
        self.model, self.state = placed_like(found, like)


def sharded(params, mesh):
    """Returns arrays cut on their last two axes, as far as the mesh divides them."""

    def put(x):
        spec = [None] * (x.ndim - 2) + ["fsdp", "tp"] if x.ndim > 1 else []
        spec = [
            name if name and n % mesh.shape[name] == 0 else None
            for n, name in zip(x.shape, spec, strict=False)
        ]
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(put, params)


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
        if mesh is None:
            return EquinoxTrainer(model, optimizer.init(params), optimizer, None)
        params = sharded(params, mesh)
        shardings = state_shardings(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        return EquinoxTrainer(eqx.combine(params, static), state, optimizer, mesh)
