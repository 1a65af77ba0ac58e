"""Flax NNX: ``nnx.Optimizer``, Orbax on the state; names of axes where on a mesh."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from tests.clients.flax_linen import EXPECTED
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
)


class Block(nnx.Module):
    def __init__(self, sharded: bool, rngs: nnx.Rngs):
        def kernel(*names):
            return {"kernel_metadata": {"out_sharding": names} if sharded else {}}

        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS,
            in_features=WIDTH,
            qkv_features=INNER,
            decode=False,
            **kernel("fsdp", "tp", None),
            out_kernel_metadata=kernel("tp", None, "fsdp")["kernel_metadata"],
            rngs=rngs,
        )
        self.up = nnx.Linear(WIDTH, HIDDEN, **kernel("fsdp", "tp"), rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, **kernel("tp", "fsdp"), rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    """A scanned transformer with a convolution before its head."""

    def __init__(self, sharded: bool, rngs: nnx.Rngs):
        metadata = {"out_sharding": ("tp", "fsdp")} if sharded else {}
        self.embedding = nnx.Embed(
            VOCABULARY, WIDTH, embedding_metadata=metadata, rngs=rngs
        )
        meta = {nnx.PARTITION_NAME: None}

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(transform_metadata=meta)
        def stack(rngs):
            return Block(sharded, rngs)

        self.layers = stack(rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, 3, padding="CAUSAL", rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        def through(x, layer):
            return layer(x)

        x = through(self.embedding(tokens), self.layers)
        return self.head(x + nnx.relu(self.conv(x)))


@nnx.jit
def train_step(model, optimizer, tokens, targets):
    def loss(model):
        return cross_entropy(model(tokens), targets)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


class NNXTrainer(Trainer):
    def __init__(self, model: nnx.Module, optimizer: Any, mesh: Mesh | None):
        self.model, self.mesh = model, mesh
        self.optimizer = optimizer

    @property
    def params(self):
        return nnx.state(self.model, nnx.Param)

    @property
    def opt_state(self):
        return self.optimizer.opt_state

    def step(self, index):
        with on(self.mesh):
            return float(train_step(self.model, self.optimizer, *batch(index)))

    @property
    def _states(self):
        return {
            "model": nnx.state(self.model),
            "optimizer": nnx.state(self.optimizer),
        }

    def save(self, directory: Path):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "state", self._states)

    def restore(self, directory: Path):
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(directory / "state", self._states)
        nnx.update(self.model, found["model"])
        nnx.update(self.optimizer, found["optimizer"])


class NNX(Client):
    without_gradient = ("key/bias",)
    expected = EXPECTED

    def trainer(self, optimizer, mesh=None, seed=0):
        def create():
            model = Model(mesh is not None, nnx.Rngs(seed))
            return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

        with on(mesh):
            made = (nnx.jit(create) if mesh else create)()
        return NNXTrainer(*made, mesh)
