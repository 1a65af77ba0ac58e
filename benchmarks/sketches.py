"""How much of a gradient a basis captures: from a sketch against from the gradient.

The command trains the tiny LLaMA with full gradients. At some steps it takes leading
right singular vectors of one batch's gradients, of their sketches, and of the same for
eight batches. The result is the share of eight *other* batches' gradients in these
bases, a mean over leaves: what the updates up to the next renewal are made of.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax
from benchmarks import harness
from benchmarks.budget import captured, gradient_function, leading
from experiments.distribution.mesh import whole
from experiments.distribution.placement import initial_state, shard_batch
from experiments.run.assemble import assemble
from experiments.run.config import parse
from experiments.run.step import make_train_step

STEPS = (0, 200, 600)
BATCHES = 8  # to fit bases to, and as many others
# Rows of a sketch as multiples of the rank.
WIDTHS = (1.25, 2, 3)
# Those of cpu-small.
RATES = {
    "adarankgrad": ["--learning-rate", "0.032", "--block-scale", "0.125"],
    "sumo": ["--learning-rate", "0.016", "--block-scale", "0.5"],
}


def summed(trees: list[Any]) -> Any:
    """Returns the sum of trees of arrays, in float64."""
    return jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), 0), *trees)


def of_rows(rows: dict[str, Any], capacities: dict[str, int]) -> dict[str, np.ndarray]:
    """Returns the leading right singular vectors of each leaf's sketch."""
    found = {}
    for path, rank in capacities.items():
        right = np.linalg.svd(rows[path], full_matrices=False)[2]
        found[path] = np.swapaxes(right, -1, -2)[..., :rank]
    return found


def shares(parts: Any, params: Any, state: Any, batches: list[Any]) -> dict[str, float]:
    """Returns how a basis was made -> share of other batches' gradients in it."""
    gradient = gradient_function(parts)
    seen = [jax.device_get(gradient(params, batch)) for batch in batches]
    fitted, others = seen[:BATCHES], seen[BATCHES:]
    capacities = lowrank_optax.capacities(state)
    bases = {
        "gradient": leading(fitted[0], capacities),
        f"gradients of {BATCHES} batches": leading(summed(fitted), capacities),
    }

    def loss(params, batch):
        nats, weight = parts.work.loss(params, batch)
        return nats / weight

    function = lowrank_optax.subspace_value_and_grad(loss, parts.tx)
    (rank,) = set(capacities.values())
    for width in WIDTHS:
        sketching = jax.jit(function.sketching(oversample=int(width * rank) - rank))
        rows = []
        for batch in batches[:BATCHES]:
            *_, sketches = sketching(params, state, batch)
            rows.append({path: np.asarray(x.rows) for path, x in sketches.items()})
        name = f"sketch of {width:g} r rows"
        bases[name] = of_rows(rows[0], capacities)
        bases[f"{name}, {BATCHES} batches"] = of_rows(summed(rows), capacities)
    return {name: captured(basis, others)["share"] for name, basis in bases.items()}


def measure(optimizer: str, data: str) -> dict[str, dict[str, float]]:
    """Returns step -> how a basis was made -> share."""
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--optimizer", optimizer, *RATES[optimizer], "--data", data]
        out = str(Path(directory) / "out")
        parts = assemble(
            parse([*flags, "--steps", str(STEPS[-1]), "--out", out]), print
        )
    params = parts.initial_params()
    step = make_train_step(parts.work.loss, parts.tx)
    state = initial_state(parts.tx, params, whole(parts.mesh))
    state = step.state_of(params, state)
    batches = parts.work.data.train_iterator()

    def following():
        return shard_batch(next(batches), parts.mesh)

    found = {}
    for number in range(STEPS[-1] + 1):
        if number in STEPS:
            seen = [following() for _ in range(2 * BATCHES)]
            # Donated below.
            copied = jax.tree.map(jnp.copy, state.optimizer)
            found[f"step {number}"] = shares(parts, params, copied, seen)
            print(optimizer, number, found[f"step {number}"], flush=True)
        params, state, _ = step(params, state, following())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="embedded", help="--data of pretrain_llama")
    arguments = parser.parse_args()
    found = {name: measure(name, arguments.data) for name in RATES}
    harness.save("sketches", found)


if __name__ == "__main__":
    main()
