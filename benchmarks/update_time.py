"""Time of an update outside a refresh, against optax.contrib.galore's."""

import argparse
import functools

import optax

import lowrank_optax
from benchmarks import harness, llama

SIDES: tuple[lowrank_optax.Side, ...] = ("short", "long")


def measure(
    size: str, rank: int, side: lowrank_optax.Side, rounds: int, stacked: bool = True
) -> dict:
    stacks = llama.block_gradients(size)
    apart = llama.unstacked(stacks)
    alternatives = {
        "ours": (llama.ours(rank, side), stacks if stacked else apart),
        "theirs": (llama.theirs(rank), apart),
    }
    steps, compile_seconds = {}, {}
    for who, (tx, gradients) in alternatives.items():
        compiled, state, compile_seconds[who] = harness.compiled_update(tx, gradients)
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


def measure_against(
    ours: optax.GradientTransformation,
    theirs: optax.GradientTransformation,
    rounds: int,
) -> dict:
    """Times the whole optimizer of ours and of theirs, outside a refresh."""
    params = llama.block_gradients("60m", seed=1)
    grads = llama.block_gradients("60m")
    steps, compile_seconds = {}, {}
    for who, tx in (("ours", ours), ("theirs", theirs)):
        compiled, state, compile_seconds[who] = harness.compiled_update(
            tx, grads, params
        )
        _, state = compiled(grads, state, params)
        with_params = functools.partial(_with_params, compiled, params)
        steps[who] = _stepper(with_params, grads, state)
        harness.seconds(steps[who])
    result = harness.paired(steps["ours"], steps["theirs"], rounds)
    return {**result, "compile_seconds": compile_seconds}


def _with_params(compiled, params, grads, state):
    return compiled(grads, state, params)


def various_grained(rounds: int) -> dict[str, dict]:
    """Returns ProjFactor and VLoRP at c * r = 128 against optax's optimizers."""
    never = lowrank_optax.every(10**6, stagger=False)
    ours = {
        f"{method.__name__} c={c} r={r}": method(1e-3, r, c, refresh=never)
        for method in (lowrank_optax.projfactor, lowrank_optax.vlorp)
        for c, r in ((1, 128), (16, 8), (128, 1))
    }
    theirs = {"adamw": optax.adamw(1e-3), "adafactor": optax.adafactor(1e-3)}
    return {
        f"60m {name} against {peer}": measure_against(tx, theirs[peer], rounds)
        for name, tx in ours.items()
        for peer in (theirs if name.startswith("projfactor") else ["adamw"])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="timed pairs per case")
    rounds = parser.parse_args().rounds
    harness.write("various-grained-update", various_grained(rounds))
    updates = {
        f"60m rank 128 side {side}": measure("60m", 128, side, rounds) for side in SIDES
    }
    updates["60m rank 128 side short, not stacked"] = measure(
        "60m", 128, "short", rounds, stacked=False
    )
    harness.write("update", updates)


if __name__ == "__main__":
    main()
