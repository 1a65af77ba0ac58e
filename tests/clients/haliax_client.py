"""Haliax: parameters that are ``NamedArray``, sharded by the names of their axes."""

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import optax
from haliax import Axis

from tests.clients.equinox_client import EquinoxLoop
from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Client,
    cross_entropy,
    matrices,
    stacked,
    under,
)

Vocab, Embed, Mlp = (
    Axis("vocab", VOCABULARY),
    Axis("embed", WIDTH),
    Axis("mlp", HIDDEN),
)
Heads, HeadSize = Axis("heads", HEADS), Axis("head_size", HEAD_DIM)
Layers = Axis("layers", LAYERS)
MAPPING = {"embed": "fsdp", "mlp": "tp", "heads": "tp", "vocab": "tp"}


class Block(eqx.Module):
    norm: hnn.LayerNorm
    q_proj: hnn.Linear
    k_proj: hnn.Linear
    v_proj: hnn.Linear
    o_proj: hnn.Linear
    mlp: hnn.MLP

    @staticmethod
    def init(*, key):
        keys = jax.random.split(key, 5)

        def projection(key):
            heads = (Heads, HeadSize)
            return hnn.Linear.init(Embed, heads, key=key, use_bias=False)

        return Block(
            hnn.LayerNorm.init(Embed),
            *map(projection, keys[:3]),
            hnn.Linear.init((Heads, HeadSize), Embed, key=keys[3]),
            hnn.MLP.init(Embed, Embed, Mlp, 1, key=keys[4]),
        )

    def __call__(self, x):
        h = self.norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        Position = x.resolve_axis("position")
        Key = Position.alias("key_position")
        k, v = (x.rename({"position": "key_position"}) for x in (k, v))
        mask = hax.arange(Position).broadcast_axis(Key) >= hax.arange(Key)
        scores = hax.dot(q, k, axis=HeadSize) / HEAD_DIM**0.5
        weights = hax.nn.softmax(hax.where(mask, scores, -1e9), axis=Key)
        x = x + self.o_proj(hax.dot(weights, v, axis=Key))
        return x + self.mlp(x)


class Model(eqx.Module):
    """A scanned transformer with named axes."""

    embedding: hnn.Embedding
    layers: hnn.Stacked
    head: hnn.Linear

    @staticmethod
    def init(key):
        first, second, third = jax.random.split(key, 3)
        return Model(
            hnn.Embedding.init(Vocab, Embed, key=first),
            hnn.Stacked.init(Layers, Block)(key=jax.random.split(second, LAYERS)),
            hnn.Linear.init(Embed, Vocab, key=third, use_bias=False),
        )

    def __call__(self, tokens):
        return self.head(self.layers.fold(self.embedding(tokens)))


@eqx.filter_jit
def train_step(model, state, optimizer, tokens, targets):
    @eqx.filter_value_and_grad
    def loss(model):
        named = hax.named(tokens, ("batch", "position"))
        logits = model(named).rearrange(("batch", "position", "vocab"))
        return cross_entropy(logits.array, targets)

    value, gradients = loss(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    return eqx.apply_updates(model, updates), state, value


LAYER = {
    "norm/weight": None,
    "norm/bias": None,
    "q_proj/weight": matrices(WIDTH, INNER),
    "k_proj/weight": matrices(WIDTH, INNER),
    "v_proj/weight": matrices(WIDTH, INNER),
    "o_proj/weight": matrices(INNER, WIDTH),
    "o_proj/bias": None,
    "mlp/layers/0/weight": matrices(WIDTH, HIDDEN),
    "mlp/layers/0/bias": None,
    "mlp/layers/1/weight": matrices(HIDDEN, WIDTH),
    "mlp/layers/1/bias": None,
}
EXPECTED = {
    "embedding/weight": matrices(VOCABULARY, WIDTH),
    **under("layers/stacked", stacked(LAYER, LAYERS)),
    "head/weight": matrices(WIDTH, VOCABULARY),
}


class Haliax(Client):
    expected = EXPECTED

    def trainer(self, optimizer: optax.GradientTransformation, mesh=None, seed=0):
        def create():
            model = Model.init(jax.random.key(seed))
            params = eqx.filter(model, eqx.is_inexact_array)
            return model, optimizer.init(params)

        if mesh is None:
            return EquinoxLoop(train_step, create(), optimizer, None)
        with jax.set_mesh(mesh):
            made = hax.named_jit(create, out_axis_resources=MAPPING)()
        return EquinoxLoop(train_step, made, optimizer, mesh)
