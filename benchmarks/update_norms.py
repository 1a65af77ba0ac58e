"""Norms of Adam's updates across a refresh, for every re-basing rule.

The gradients are noise, or those of the tiny LLaMA in training. With noise a new
subspace shares little with the old subspace.
"""

import argparse
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax
from benchmarks import harness
from benchmarks.budget import gradient_function
from experiments.distribution.placement import shard_batch
from experiments.model.groups import parameter_groups
from experiments.run.assemble import assemble
from experiments.run.config import parse

GAP = 200  # updates between two refreshes
AFTER = (0, 10, 50, 100, 190)  # updates after a refresh
RANK = 32


def adam(rule: str) -> optax.GradientTransformation:
    """Returns Adam in subspaces, with a renewal of all of them every GAP updates."""
    refresh = lowrank_optax.every(GAP, stagger=False)
    return lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(), RANK, rebase=rule, refresh=refresh
    )


def on_noise(rule: str) -> dict[str, float]:
    """Gaussian gradients, (256, 128)."""
    tx, shape = adam(rule), (256, 128)

    def body(state, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        updates, state = tx.update(jax.random.normal(key, shape), state)
        return state, jnp.linalg.norm(updates)

    run = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(2 * GAP))[1])
    return relative(np.asarray(run(tx.init(jnp.zeros(shape)))))


def in_training(rule: str, parts: Any) -> dict[str, float]:
    """The block matrices of a model in training with these updates."""
    # Multiples of the learning rate, as in the comparison of the experiments.
    rates = {"blocks": 0.25, "rest": 1.0, "norms": 1.0}
    ways = dict.fromkeys(("rest", "norms"), optax.scale_by_adam())
    params = parts.initial_params()
    groups = parameter_groups(params)
    tx = optax.partition({"blocks": adam(rule), **ways}, groups)
    gradient = gradient_function(parts)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, number):
        updates, state = tx.update(gradient(params, batch), state, params)
        rate = parts.schedule(number)
        scaled = jax.tree.map(lambda u, g: -rates[g] * rate * u, updates, groups)
        blocks = jax.tree.map(lambda u, g: u * (g == "blocks"), updates, groups)
        return optax.apply_updates(params, scaled), state, optax.tree.norm(blocks)

    state, norms = jax.jit(tx.init)(params), []
    batches = parts.work.data.train_iterator()
    for number in range(2 * GAP):
        batch = shard_batch(next(batches), parts.mesh)
        params, state, norm = step(params, state, batch, number)
        norms.append(float(norm))
    return relative(np.asarray(norms))


def relative(norms: np.ndarray) -> dict[str, float]:
    """Returns norms after the refresh at GAP, over the mean of the 50 norms before."""
    before = norms[GAP - 50 : GAP].mean()
    after = norms[GAP:] / before
    found = {f"after {n}": float(after[n]) for n in AFTER}
    return {"before": float(before), "most": float(after.max()), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="embedded", help="--data of pretrain_llama")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        words = f"--steps {3 * GAP} --learning-rate 16e-3 --out {directory}/out".split()
        parts = assemble(parse([*words, "--data", arguments.data]), print)
    found = {}
    for rule in lowrank_optax.REBASE_RULES:
        found[f"noise, {rule}"] = on_noise(rule)
        found[f"tiny, {rule}"] = in_training(rule, parts)
    harness.save("update-norms", found)
    for name, norms in found.items():
        print(name, ", ".join(f"{key} {value:.2f}" for key, value in norms.items()))


if __name__ == "__main__":
    main()
