"""Time of an update outside a refresh, against optax.contrib.galore's."""

import argparse
import time

import jax

import lowrank_optax
from benchmarks import harness, llama

SIDES: tuple[lowrank_optax.Side, ...] = ("short", "long")


def measure(size: str, rank: int, side: lowrank_optax.Side, rounds: int) -> dict:
    stacked = llama.block_gradients(size)
    alternatives = {
        "ours": (llama.ours(rank, side), stacked),
        "theirs": (llama.theirs(rank), llama.unstacked(stacked)),
    }
    steps, compile_seconds = {}, {}
    for who, (tx, gradients) in alternatives.items():
        state = tx.init(gradients)
        start = time.perf_counter()
        # Donated, as in a training loop.
        jitted = jax.jit(tx.update, donate_argnums=1)
        compiled = jitted.lower(gradients, state).compile()
        compile_seconds[who] = time.perf_counter() - start
        _, state = compiled(gradients, state)
        steps[who] = _stepper(compiled, gradients, state)
    for step in steps.values():
        harness.seconds(step)
    result = harness.paired(steps["ours"], steps["theirs"], rounds)
    return {**result, "rank": rank, "side": side, "compile_seconds": compile_seconds}


def _stepper(compiled, gradients, state):
    def step():
        nonlocal state
        updates, state = compiled(gradients, state)
        return updates

    return lambda: step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="timed pairs per case")
    rounds = parser.parse_args().rounds
    harness.write(
        "update",
        {
            f"60m rank 128 side {side}": measure("60m", 128, side, rounds)
            for side in SIDES
        },
    )


if __name__ == "__main__":
    main()
