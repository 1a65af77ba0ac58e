"""Energy captured by columns spread over the leaves, against a uniform rank.

The command trains the tiny LLaMA for a while with GaLore at a uniform rank, and spreads
the same bytes by ``lowrank_optax.reallocate``. It then takes leading singular subspaces
of one batch's gradients, of each leaf's rank. The result is the share of other batches'
gradients in these subspaces.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lowrank_optax
from benchmarks import harness
from experiments.distribution.mesh import whole
from experiments.distribution.placement import initial_state, shard_batch
from experiments.model.llama import apply
from experiments.run.assemble import assemble
from experiments.run.config import parse
from experiments.run.step import make_train_step

BATCHES = 8


def gradient_function(parts: Any):
    """Returns the jitted (params, batch) -> gradients."""

    def loss(params, batch):
        logits = apply(parts.work.model, params, batch["inputs"])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (nats * batch["weights"]).sum() / batch["weights"].sum()

    return jax.jit(jax.grad(loss))


def leaf_at(tree: Any, path: str) -> np.ndarray:
    """Returns the leaf of a nested dict at a key path's string."""
    for key in path.strip("[']").split("']['"):
        tree = tree[key]
    return np.asarray(tree, np.float64)


def captured(bases: dict[str, np.ndarray], gradients: list[Any]) -> dict[str, float]:
    """Returns the share of the energy in the bases: in all, and as a mean of leaves."""
    inside, whole = {}, {}
    for path, basis in bases.items():
        for tree in gradients:
            gradient = oriented(leaf_at(tree, path))
            inside[path] = inside.get(path, 0) + np.sum((gradient @ basis) ** 2)
            whole[path] = whole.get(path, 0) + np.sum(gradient**2)
    return {
        "energy": sum(inside.values()) / sum(whole.values()),
        "share": float(np.mean([inside[path] / whole[path] for path in bases])),
    }


def oriented(gradient: np.ndarray) -> np.ndarray:
    """Returns a stack of gradients, with the short side last."""
    is_wide = gradient.shape[-2] < gradient.shape[-1]
    return np.swapaxes(gradient, -1, -2) if is_wide else gradient


def leading(gradient: Any, capacities: dict[str, int]) -> dict[str, np.ndarray]:
    """Returns the leading right singular vectors of each leaf's gradient."""
    found = {}
    for path, rank in capacities.items():
        right = np.linalg.svd(oriented(leaf_at(gradient, path)))[2]
        found[path] = np.swapaxes(right, -1, -2)[..., :rank]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="embedded", help="--data of pretrain_llama")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--rank", type=int, default=32, help="uniform rank")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flags = {
            "--optimizer": "galore",
            "--data": arguments.data,
            "--steps": arguments.steps,
            "--rank": arguments.rank,
            "--out": Path(directory) / "out",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        parts = assemble(parse(words), print)
    params = parts.initial_params()
    step = make_train_step(parts.work.loss, parts.tx)
    state = initial_state(parts.tx, params, whole(parts.mesh))
    state = step.state_of(params, state)
    batches = parts.work.data.train_iterator()
    for _ in range(arguments.steps):
        batch = shard_batch(next(batches), parts.mesh)
        params, state, _ = step(params, state, batch)
    state = state.optimizer
    gradient = gradient_function(parts)
    seen = [
        jax.device_get(gradient(params, shard_batch(next(batches), parts.mesh)))
        for _ in range(BATCHES + 1)
    ]
    found = {}
    spreads = {
        "uniform": state,
        "share": lowrank_optax.reallocate(state, weight="share"),
        "energy": lowrank_optax.reallocate(state, weight="energy"),
    }
    for name, spread in spreads.items():
        capacities = lowrank_optax.capacities(spread)
        size = sum(
            leaf.capacity * leaf.bytes_per_column
            for leaf in lowrank_optax.columns(spread).values()
        )
        shares = captured(leading(seen[0], capacities), seen[1:])
        found[name] = {"bytes": size, **shares, "capacities": capacities}
        print(
            f"{name:8} {size:12,.0f} bytes, captured: {shares['energy']:.4f} of all "
            f"energy, {shares['share']:.4f} on average over leaves; "
            f"{list(capacities.values())}"
        )
    harness.save("budget-tiny", found)


if __name__ == "__main__":
    main()
