"""A tree like MaxText's: logical names, and the layers of a scan on axis 1.

MaxText itself comes with all that a TPU trainer needs; its parameters are these.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.clients.flax_linen import LinenTrainer, creator
from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Client,
    matrices,
    stacked,
    under,
)

RULES = (
    ("embed", "fsdp"),
    ("mlp", "tp"),
    ("q_heads", "tp"),
    ("kv_heads", "tp"),
    ("heads", "tp"),
    ("vocab", "tp"),
)


class Kernel(nn.Module):
    """MaxText's DenseGeneral: a kernel with a name for each of its axes."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    product: str
    fan_in: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.fan_in**-0.5)
        named = nn.with_logical_partitioning(init, self.names)
        return jnp.einsum(self.product, x, self.param("kernel", named, self.shape))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (WIDTH,))
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        def heads(name, axis):
            shape, names = (WIDTH, HEADS, HEAD_DIM), ("embed", axis, "kv")
            return Kernel(shape, names, "bld,dhk->blhk", WIDTH, name=name)(x)

        q, k = heads("query", "q_heads"), heads("key", "kv_heads")
        v = heads("value", "kv_heads")
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        shape, names = (HEADS, HEAD_DIM, WIDTH), ("heads", "kv", "embed")
        return Kernel(shape, names, "blhk,hkd->bld", INNER, name="out")(mixed)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        def dense(rows, columns, names, name) -> Callable:
            return Kernel((rows, columns), names, "...d,df->...f", rows, name=name)

        gate = dense(WIDTH, HIDDEN, ("embed", "mlp"), "wi_0")(x)
        up = dense(WIDTH, HIDDEN, ("embed", "mlp"), "wi_1")(x)
        return dense(HIDDEN, WIDTH, ("mlp", "embed"), "wo")(jax.nn.silu(gate) * up)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = RMSNorm(name="pre_self_attention_layer_norm")(x)
        x = x + Attention(name="self_attention")(h)
        h = RMSNorm(name="post_self_attention_layer_norm")(x)
        return x + MLP(name="mlp")(h), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, None)
        x = RMSNorm(name="decoder_norm")(x)
        shape, names = (WIDTH, VOCABULARY), ("embed", "vocab")
        return Kernel(shape, names, "bld,dv->blv", WIDTH, name="logits_dense")(x)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(1.0)
        named = nn.with_logical_partitioning(init, ("vocab", "embed"))
        embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=named, name="token_embedder")
        return Decoder(name="decoder")(embed(tokens))


LAYER = {
    "pre_self_attention_layer_norm/scale": None,
    "post_self_attention_layer_norm/scale": None,
    "self_attention/query/kernel": matrices(WIDTH, INNER),
    "self_attention/key/kernel": matrices(WIDTH, INNER),
    "self_attention/value/kernel": matrices(WIDTH, INNER),
    "self_attention/out/kernel": matrices(INNER, WIDTH),
    "mlp/wi_0/kernel": matrices(WIDTH, HIDDEN),
    "mlp/wi_1/kernel": matrices(WIDTH, HIDDEN),
    "mlp/wo/kernel": matrices(HIDDEN, WIDTH),
}
EXPECTED = {
    "token_embedder/embedding": matrices(VOCABULARY, WIDTH),
    **under("decoder/layers", stacked(LAYER, LAYERS)),
    "decoder/decoder_norm/scale": None,
    "decoder/logits_dense/kernel": matrices(WIDTH, VOCABULARY),
}


class MaxTextLike(Client):
    model = Model()
    expected = EXPECTED

    def trainer(self, optimizer, mesh=None, seed=0):
        create, key = creator(self.model, optimizer), jax.random.key(seed)
        if mesh is None:
            return LinenTrainer(create(key), None)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            names = nn.get_partition_spec(jax.eval_shape(create, key))
            shardings = nn.logical_to_mesh_sharding(names, mesh, RULES)
            state = jax.jit(create, out_shardings=shardings)(key)
        return LinenTrainer(state, mesh)
