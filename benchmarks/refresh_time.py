"""Time of an update that refreshes every basis, against optax.contrib.galore's."""

import argparse
import time

import jax

from benchmarks import harness, llama


def measure(size: str, rank: int, power_iterations: int, rounds: int) -> dict:
    stacked = llama.block_gradients(size)
    unstacked = llama.unstacked(stacked)
    alternatives = {
        "ours": (llama.ours(rank, "short", power_iterations), stacked),
        "theirs": (llama.theirs(rank), unstacked),
    }
    steps, compile_seconds = {}, {}
    for who, (tx, gradients) in alternatives.items():
        # A fresh state is due at once, so each call refreshes every leaf.
        state = tx.init(gradients)
        start = time.perf_counter()
        compiled = jax.jit(tx.update).lower(gradients, state).compile()
        compile_seconds[who] = time.perf_counter() - start
        steps[who] = lambda c=compiled, g=gradients, s=state: c(g, s)
    # The first calls of a program pay for its memory.
    for _ in range(2):
        jax.block_until_ready(steps["ours"]())
    result = harness.paired(steps["ours"], steps["theirs"], rounds)
    return {
        **result,
        "rank": rank,
        "power_iterations": power_iterations,
        "compile_seconds": compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs per case")
    parser.add_argument("--size", choices=llama.SIZES, default="60m")
    parser.add_argument("--power-iterations", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    harness.write(
        f"refresh-{options.size}",
        {
            f"rank 128, {iterations} power iterations": measure(
                options.size, 128, iterations, options.rounds
            )
            for iterations in options.power_iterations
        },
    )


if __name__ == "__main__":
    main()
