"""A training step of a small LLaMA, compiled for eight simulated devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from experiments.model.llama import Params, init_params, module_of, rotation_of
from experiments.model.shape import LlamaConfig

SEQUENCES, TOKENS = 16, 64
BATCH = P(("data", "fsdp"))
# The axis of the hidden side, which fsdp cuts; 1 in all other leaves.
HIDDEN_AXIS = {"output": 2, "down": 2, "norm": 0, "head": 0}


def model_of(layers: int) -> LlamaConfig:
    """Returns a LLaMA of hidden size 256."""
    return LlamaConfig(512, 256, 704, layers, num_heads=4, num_kv_heads=4)


def sharded_params(model: LlamaConfig, mesh: Mesh) -> Params:
    """Returns the shapes of the parameters, with the hidden side cut over fsdp."""

    def with_sharding(path, leaf):
        spec: list[Any] = [None] * leaf.ndim
        spec[HIDDEN_AXIS.get(path[-1].key, 1)] = "fsdp"
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(with_sharding, shapes)


def compiled_step(
    model: LlamaConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    in_subspaces: bool = False,
) -> str:
    """Returns the compiled text of a training step without a renewal of bases.

    Args:
        model: The model.
        tx: Its optimizer.
        mesh: Mesh with automatic axes "data" and "fsdp".
        in_subspaces: Whether gradients are computed inside the subspaces.
    """
    tx = optax.with_extra_args_support(tx)
    params = sharded_params(model, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        lowrank_optax.state_shardings(tx, params),
    )
    batch = jax.ShapeDtypeStruct(
        (SEQUENCES, TOKENS + 1), jnp.int32, sharding=NamedSharding(mesh, BATCH)
    )

    def loss(params, tokens):
        logits = _apply(model, params, tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nats)

    def step(params, state, tokens):
        if in_subspaces:
            gradient = lowrank_optax.subspace_value_and_grad(loss, tx)
            value, grads, state = gradient.keeping(params, state, tokens)
        else:
            value, grads = jax.value_and_grad(loss)(params, tokens)
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state, value

    given = params, state, batch
    placed = jax.tree.map(lambda x: x.sharding, given)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            in_shardings=placed,
            out_shardings=(*placed[:2], NamedSharding(mesh, P())),
            donate_argnums=(0, 1),
        )
        text = jitted.lower(*given).compile().as_text()
    assert text is not None, "this backend shows no text of its programs"
    return text


def _apply(model: LlamaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the model's logits, with activations cut along the batch.

    The compiler then gathers a layer's parameters; otherwise it cuts the activations
    along their hidden side, and adds these up.
    """
    module = module_of(model, params)
    graph, layers = nnx.split(module.blocks)
    rotation = rotation_of(model, jnp.arange(tokens.shape[1], dtype=jnp.float32))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(hidden, layer):
        return _cut(nnx.merge(graph, layer)(hidden, rotation)[0]), None

    hidden, _ = jax.lax.scan(block, _cut(module.embed(tokens)), layers)
    return module.logits(hidden)


def _cut(activations: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(activations, BATCH)
