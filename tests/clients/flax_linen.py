"""Flax Linen: ``TrainState`` and Orbax; boxes that name axes where on a mesh."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState

from tests.clients.placement import on
from tests.clients.protocol import (
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
    stacked,
    under,
)


class Block(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, x, _):
        def named(*names):
            init = nn.initializers.lecun_normal()
            return nn.with_partitioning(init, names) if self.boxed else init

        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(
            HEADS,
            qkv_features=INNER,
            kernel_init=named("fsdp", "tp", None),
            out_kernel_init=named("tp", None, "fsdp"),
            name="attention",
        )
        x = x + attention(nn.LayerNorm(name="norm")(x), mask=mask)
        up = nn.Dense(HIDDEN, kernel_init=named("fsdp", "tp"), name="up")
        down = nn.Dense(WIDTH, kernel_init=named("tp", "fsdp"), name="down")
        return x + down(nn.gelu(up(x))), None


class Model(nn.Module):
    """A scanned transformer with a convolution before its head."""

    boxed: bool

    @nn.compact
    def __call__(self, tokens):
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x = nn.Embed(VOCABULARY, WIDTH, name="embedding")(tokens)
        x, _ = stack(self.boxed, name="layers")(x, None)
        x = x + nn.relu(nn.Conv(WIDTH, (3,), padding="CAUSAL", name="conv")(x))
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(x)


# One object, or a state made anew is another type, and compiled anew.
make_model = functools.cache(Model)


@jax.jit
def train_step(state, tokens, targets):
    def loss(params):
        return cross_entropy(state.apply_fn({"params": params}, tokens), targets)

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def creator(model, optimizer):
    """Returns the function that makes a state from a key."""
    tokens = jnp.asarray(batch(0)[0])

    def create(key):
        params = model.init(key, tokens)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    return create


class LinenTrainer(Trainer):
    def __init__(self, state, mesh):
        self.state, self.mesh = state, mesh

    @property
    def params(self):
        return self.state.params

    @property
    def opt_state(self):
        return self.state.opt_state

    def step(self, index):
        with on(self.mesh):
            self.state, loss = train_step(self.state, *batch(index))
        return float(loss)

    def save(self, directory: Path):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "state", self.state)

    def restore(self, directory: Path):
        with ocp.StandardCheckpointer() as checkpointer:
            self.state = checkpointer.restore(directory / "state", self.state)


LAYER = {
    "norm/scale": None,
    "norm/bias": None,
    "attention/query/kernel": matrices(WIDTH, INNER),
    "attention/key/kernel": matrices(WIDTH, INNER),
    "attention/value/kernel": matrices(WIDTH, INNER),
    "attention/query/bias": None,
    "attention/key/bias": None,
    "attention/value/bias": None,
    "attention/out/kernel": matrices(INNER, WIDTH),
    "attention/out/bias": None,
    "up/kernel": matrices(WIDTH, HIDDEN),
    "up/bias": None,
    "down/kernel": matrices(HIDDEN, WIDTH),
    "down/bias": None,
}
# NNX names what is in its modules as Linen does.
EXPECTED = {
    "embedding/embedding": matrices(VOCABULARY, WIDTH),
    **under("layers", stacked(LAYER, LAYERS)),
    "conv/kernel": matrices(3 * WIDTH, WIDTH),
    "conv/bias": None,
    "head/kernel": matrices(WIDTH, VOCABULARY),
}


class Linen(Client):
    """Plain arrays alone, ``nn.Partitioned`` on a mesh, as Flax's guide has it."""

    without_gradient = ("key/bias",)
    expected = EXPECTED

    def trainer(self, optimizer, mesh=None, seed=0):
        create = creator(make_model(mesh is not None), optimizer)
        key = jax.random.key(seed)
        if mesh is None:
            return LinenTrainer(create(key), None)
        # Without jax.set_mesh: DenseGeneral makes its kernels flat, and Flax would put
        # a constraint of three axes on them.
        shardings = nn.get_sharding(jax.eval_shape(create, key), mesh)
        state = jax.jit(create, out_shardings=shardings)(key)
        return LinenTrainer(state, None)
