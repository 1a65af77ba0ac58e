"""A training step of a small LLaMA, compiled for a mesh of simulated devices."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import lowrank_optax
from experiments.distribution.mesh import rows, whole
from experiments.distribution.rules import on_mesh, parameter_shardings, placed_shapes
from experiments.model.llama import Params, apply, init_params
from experiments.model.shape import LlamaConfig

SEQUENCES, TOKENS = 16, 64


def model_of(layers: int) -> LlamaConfig:
    """Returns a LLaMA of hidden size 256."""
    return LlamaConfig(512, 256, 704, layers, num_heads=4, num_kv_heads=4, remat=True)


def sharded_params(model: LlamaConfig, mesh: Mesh) -> Params:
    """Returns the shapes of the parameters, with the experiment's shardings."""
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return on_mesh(shapes, parameter_shardings(shapes, mesh))


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
        mesh: A mesh of the experiment.
        in_subspaces: Whether gradients are computed inside the subspaces.
    """
    tx = optax.with_extra_args_support(tx)
    params, state = placed_shapes(tx, sharded_params(model, mesh))
    shape = (SEQUENCES, TOKENS + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows(mesh))
    placed = jax.tree.map(lambda x: x.sharding, (params, state))

    def loss(params, tokens):
        logits = apply(model, params, tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nats)

    def step(params, state, tokens):
        if in_subspaces:
            gradient = lowrank_optax.subspace_value_and_grad(loss, tx)
            value, grads, state = gradient.keeping(params, state, tokens)
        else:
            value, grads = jax.value_and_grad(loss)(params, tokens)
            grads = jax.lax.with_sharding_constraint(grads, placed[0])
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state, value

    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step, out_shardings=(*placed, whole(mesh)), donate_argnums=(0, 1)
        )
        text = jitted.lower(params, state, batch).compile().as_text()
    assert text is not None, "this backend shows no text of its programs"
    return text
