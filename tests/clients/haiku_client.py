"""dm-haiku: ``hk.transform``, ``layer_stack``, a run kept by pickle."""

import functools
import pickle
from pathlib import Path

import haiku as hk
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
    batch,
    cross_entropy,
    matrices,
    stacked,
    under,
)


def logits(tokens):
    """A stack of layers with a convolution before its head."""
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, 1, length, length)))

    def layer(x):
        scaled = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(
            HEADS, HEAD_DIM, w_init=scaled, model_size=WIDTH
        )
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + attention(h, h, h, mask=mask)
        return x + hk.nets.MLP([HIDDEN, WIDTH], activation=jax.nn.gelu)(x)

    x = hk.experimental.layer_stack(LAYERS)(layer)(hk.Embed(VOCABULARY, WIDTH)(tokens))
    x = x + jax.nn.relu(hk.Conv1D(WIDTH, 3, padding=lambda k: (k - 1, 0))(x))
    return hk.Linear(VOCABULARY, with_bias=False)(x)


model = hk.without_apply_rng(hk.transform(logits))


@functools.partial(jax.jit, static_argnames="optimizer")
def train_step(params, state, optimizer, tokens, targets):
    def loss(params):
        return cross_entropy(model.apply(params, tokens), targets)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


class HaikuLoop(Loop):
    def save(self, directory: Path):
        content = pickle.dumps(jax.device_get(self.parts))
        (directory / "run.pickle").write_bytes(content)

    def restore(self, directory: Path):
        content = (directory / "run.pickle").read_bytes()
        self.parts = placed_like(pickle.loads(content), self.parts)


LAYER = {
    "layer_norm/scale": None,
    "layer_norm/offset": None,
    "multi_head_attention/query/w": matrices(WIDTH, INNER),
    "multi_head_attention/query/b": None,
    "multi_head_attention/key/w": matrices(WIDTH, INNER),
    "multi_head_attention/key/b": None,
    "multi_head_attention/value/w": matrices(WIDTH, INNER),
    "multi_head_attention/value/b": None,
    "multi_head_attention/linear/w": matrices(INNER, WIDTH),
    "multi_head_attention/linear/b": None,
    "mlp/~/linear_0/w": matrices(WIDTH, HIDDEN),
    "mlp/~/linear_0/b": None,
    "mlp/~/linear_1/w": matrices(HIDDEN, WIDTH),
    "mlp/~/linear_1/b": None,
}
EXPECTED = {
    "embed/embeddings": matrices(VOCABULARY, WIDTH),
    **under("__layer_stack_no_per_layer", stacked(LAYER, LAYERS)),
    "conv1_d/w": matrices(3 * WIDTH, WIDTH),
    "conv1_d/b": None,
    "linear/w": matrices(WIDTH, VOCABULARY),
}


class Haiku(Client):
    without_gradient = ("key/b",)
    expected = EXPECTED

    def trainer(self, optimizer, mesh=None, seed=0):
        params = model.init(jax.random.key(seed), batch(0)[0])
        parts = begun(optimizer, params, mesh)
        return HaikuLoop(train_step, parts, optimizer, mesh)
