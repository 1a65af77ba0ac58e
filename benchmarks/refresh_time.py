"""Time of an update with a refresh of every basis, against optax.contrib.galore."""

import argparse

import jax

from benchmarks import harness, llama


def measure(size: str, rank: int, power_iterations: float, rounds: int) -> dict:
    stacked = llama.block_gradients(size)
    unstacked = llama.unstacked(stacked)
    alternatives = {
        "ours": (llama.ours(rank, "short", power_iterations), stacked),
        "theirs": (llama.theirs(rank), unstacked),
    }
    steps, compile_seconds = {}, {}
    for who, (tx, gradients) in alternatives.items():
        compiled, _, compile_seconds[who] = harness.compiled_update(tx, gradients)
        steps[who] = _refresher(tx, compiled, gradients)
    # The first calls of a program pay for its memory.
    for _ in range(2):
        harness.seconds(steps["ours"])
    result = harness.paired(steps["ours"], steps["theirs"], rounds)
    return {
        **result,
        "rank": rank,
        "power_iterations": power_iterations,
        "compile_seconds": compile_seconds,
    }


def _refresher(tx, compiled, gradients):
    """Returns a function that prepares an update of a fresh state, with a refresh."""

    def prepare():
        state = jax.block_until_ready(tx.init(gradients))
        return lambda: compiled(gradients, state)

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs per case")
    parser.add_argument("--size", choices=llama.SIZES, default="60m")
    parser.add_argument(
        "--power-iterations", type=float, nargs="+", default=[0, 0.5, 1, 2]
    )
    options = parser.parse_args()
    harness.write(
        f"refresh-{options.size}",
        {
            f"rank 128, {iterations:g} power iterations": measure(
                options.size, 128, iterations, options.rounds
            )
            for iterations in options.power_iterations
        },
    )


if __name__ == "__main__":
    main()
