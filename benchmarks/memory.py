"""Bytes of optimizer states and of compiled training steps, LLaMA 60m, by optimizer.

The bytes come from shapes and from XLA's own ``memory_analysis``: no step runs.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from benchmarks import harness
from experiments.model.llama import apply, init_params
from experiments.model.shape import preset
from experiments.optim.unstacked import unstacked

VOCABULARY = 32_000
SEQUENCES, TOKENS = 8, 256  # of a micro-batch
BUDGET = 128  # c * r
MICRO_BATCHES = 8


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Returns each optimizer of the table, for every matrix of the model."""
    galore = optax.contrib.galore(1e-3, rank=BUDGET)
    return {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "optax.contrib.galore r=128": _on_blocks(unstacked(galore), galore),
        "galore r=128": lowrank_optax.galore(1e-3, BUDGET),
        "vlorp c=16 r=8": lowrank_optax.vlorp(1e-3, 8, 16),
        "projfactor c=16 r=8": lowrank_optax.projfactor(1e-3, 8, 16),
    }


def _on_blocks(blocks, rest) -> optax.GradientTransformation:
    """Returns ``blocks`` for the stacked leaves: optax's GaLore skips three axes."""

    def labels(params):
        return jax.tree.map(lambda x: "blocks" if x.ndim == 3 else "rest", params)

    return optax.partition({"blocks": blocks, "rest": rest}, labels)


def bytes_of(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def loss_of(model) -> Callable:
    """Returns the mean loss of the next token."""

    def loss(params, tokens):
        logits = apply(model, params, tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nats)

    return loss


def one_batch(model, tx: optax.GradientTransformation) -> Callable:
    """Returns a training step of one batch."""

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_of(model))(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def in_micro_batches(model, tx: Any) -> Callable:
    """Returns a training step of k micro-batches: MultiSteps is called k times."""
    gradient = jax.value_and_grad(loss_of(model))

    def step(params, state, tokens):
        def micro_step(carry, tokens):
            params, state = carry
            loss, grads = gradient(params, tokens)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        def add(state, tokens):
            loss, grads = gradient(params, tokens)
            return tx.add(grads, state), loss

        if not hasattr(tx, "finish"):
            (params, state), losses = jax.lax.scan(micro_step, (params, state), tokens)
            return params, state, jnp.mean(losses)
        state, losses = jax.lax.scan(add, state, tokens)
        updates, state = tx.finish(state, params)
        return optax.apply_updates(params, updates), state, jnp.mean(losses)

    return step


def measure(step: Callable, tx, params, tokens) -> dict[str, int]:
    """Returns bytes of the state and of the compiled step, parameters donated."""
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    analysis = compiled.compile().memory_analysis()
    assert analysis is not None, "this backend has no memory_analysis"
    live = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "state": bytes_of(state),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": live - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
    }


def accumulations() -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers that take k micro-batches."""
    found = optimizers()

    def multi_steps(name):
        return optax.MultiSteps(found[name], MICRO_BATCHES).gradient_transformation()

    ours = ("galore r=128", "vlorp c=16 r=8", "projfactor c=16 r=8")
    return {
        "MultiSteps(optax.adamw)": multi_steps("optax.adamw"),
        "MultiSteps(optax.contrib.galore)": multi_steps("optax.contrib.galore r=128"),
        **{
            f"accumulate({name})": lowrank_optax.accumulate(found[name], MICRO_BATCHES)
            for name in ours
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="60m", help="preset of the experiments")
    name = parser.parse_args().model
    model = preset(name, VOCABULARY, remat=True)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((SEQUENCES, TOKENS + 1), jnp.int32)
    cut = jax.ShapeDtypeStruct((MICRO_BATCHES, *tokens.shape), jnp.int32)
    found = {}
    for label, tx in optimizers().items():
        found[label] = measure(one_batch(model, tx), tx, params, tokens)
    for label, tx in accumulations().items():
        found[label] = measure(in_micro_batches(model, tx), tx, params, cut)
    print(f"{name}: {bytes_of(params) / 1e6:.1f} MB of parameters")
    for label, row in found.items():
        print(f"{label:42}", *(f"{k} {v / 1e6:8.1f} MB" for k, v in row.items()))
    harness.save(f"memory-{name}", found)


if __name__ == "__main__":
    main()
