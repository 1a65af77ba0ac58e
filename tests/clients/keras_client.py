"""Keras 3 on JAX: its stateless loop with an Optax optimizer.

The parameters are a dictionary by the variables' paths: in Keras' own list of arrays
nothing says what an array is.
"""

import functools
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import optax
import orbax.checkpoint as ocp

from tests.clients.placement import begun, on, placed_like
from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    VOCABULARY,
    WIDTH,
    Client,
    Trainer,
    batch,
    cross_entropy,
    matrices,
    under,
)

LAYERS = 2


def make_model(seed: int) -> keras.Model:
    """Returns a transformer with a convolution before its head."""
    keras.utils.set_random_seed(seed)
    keras.backend.clear_session()
    layers = keras.layers
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH, name="embedding")(tokens)
    for i in range(LAYERS):
        h = layers.LayerNormalization(name=f"norm_{i}")(x)
        attention = layers.MultiHeadAttention(HEADS, HEAD_DIM, name=f"attention_{i}")
        x = x + attention(h, h, use_causal_mask=True)
        h = layers.Dense(HIDDEN, activation="gelu", name=f"up_{i}")(x)
        x = x + layers.Dense(WIDTH, name=f"down_{i}")(h)
    conv = layers.Conv1D(WIDTH, 3, padding="causal", activation="relu", name="conv")
    x = x + conv(x)
    head = layers.Dense(VOCABULARY, use_bias=False, name="head")
    return keras.Model(tokens, head(x))


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def train_step(model, optimizer, params, fixed, state, tokens, targets):
    def loss(params):
        values = [params[x.path] for x in model.trainable_variables]
        logits, _ = model.stateless_call(values, fixed, tokens)
        return cross_entropy(logits, targets)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


class KerasTrainer(Trainer):
    def __init__(self, model, params, state, optimizer, mesh):
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self.fixed = [x.value for x in model.non_trainable_variables]
        self._params, self.state = params, state

    @property
    def params(self):
        return self._params

    @property
    def opt_state(self):
        return self.state

    def step(self, index):
        with on(self.mesh):
            self._params, self.state, loss = train_step(
                self.model,
                self.optimizer,
                self._params,
                self.fixed,
                self.state,
                *batch(index),
            )
        return float(loss)

    def save(self, directory: Path):
        for variable in self.model.trainable_variables:
            variable.assign(self._params[variable.path])
        self.model.save(directory / "model.keras")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "state", self.state)

    def restore(self, directory: Path):
        self.model = keras.saving.load_model(directory / "model.keras")
        params = {x.path: x.value for x in self.model.trainable_variables}
        self._params = placed_like(params, self._params)
        with ocp.StandardCheckpointer() as checkpointer:
            self.state = checkpointer.restore(directory / "state", self.state)


EXPECTED = {
    "embedding/embeddings": matrices(VOCABULARY, WIDTH),
    **{
        f"{name}_{i}/{leaf}": seen
        for i in range(LAYERS)
        for name, listing in {
            "norm": {"gamma": None, "beta": None},
            "attention": {
                "query/kernel": matrices(WIDTH, INNER),
                "query/bias": None,
                "key/kernel": matrices(WIDTH, INNER),
                "key/bias": None,
                "value/kernel": matrices(WIDTH, INNER),
                "value/bias": None,
                "attention_output/kernel": matrices(INNER, WIDTH),
                "attention_output/bias": None,
            },
            "up": {"kernel": matrices(WIDTH, HIDDEN), "bias": None},
            "down": {"kernel": matrices(HIDDEN, WIDTH), "bias": None},
        }.items()
        for leaf, seen in listing.items()
    },
    **under("conv", {"kernel": matrices(3 * WIDTH, WIDTH), "bias": None}),
    "head/kernel": matrices(WIDTH, VOCABULARY),
}


class Keras(Client):
    without_gradient = ("key/bias",)
    expected = EXPECTED

    def trainer(self, optimizer, mesh=None, seed=0):
        model = make_model(seed)
        params = {x.path: jnp.copy(x.value) for x in model.trainable_variables}
        params, state = begun(optimizer, params, mesh)
        return KerasTrainer(model, params, state, optimizer, mesh)
