"""Time of an update that refreshes every basis, against optax.contrib.galore's."""

import argparse
import time

import jax

from benchmarks import harness, llama


def measure(size: str, rank: int, rounds: int) -> dict:
    stacked = llama.block_gradients(size)
    unstacked = llama.unstacked(stacked)
    alternatives = {
        "ours": (llama.ours(rank), stacked),
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
    jax.block_until_ready(steps["ours"]())
    result = harness.paired(steps["ours"], steps["theirs"], rounds)
    return {**result, "rank": rank, "compile_seconds": compile_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed pairs per size")
    rounds = parser.parse_args().rounds
    harness.write(
        "refresh",
        {
            "60m rank 128": measure("60m", 128, rounds),
            "1b one layer rank 512": measure("1b-one-layer", 512, rounds),
        },
    )


if __name__ == "__main__":
    main()
