"""Time of an update outside a refresh.

Adam inside the subspaces is compared with optax.contrib.galore, VLoRP and ProjFactor
with AdamW and Adafactor.
"""

import argparse
from typing import Literal

import optax

import lowrank_optax
from benchmarks import harness, llama

Side = Literal["short", "long"]
SIDES: tuple[Side, ...] = ("short", "long")


def measure(size: str, rank: int, side: Side, rounds: int, stacked: bool) -> dict:
    """Times the transformation alone, ours and that of optax.contrib.galore."""
    stacks = llama.block_gradients(size)
    apart = llama.unstacked(stacks)
    result = _compared(
        _stepper(llama.ours(rank, side), stacks if stacked else apart),
        _stepper(llama.theirs(rank), apart),
        rounds,
    )
    return {**result, "rank": rank, "side": side}


def measure_against(
    ours: optax.GradientTransformation,
    theirs: optax.GradientTransformation,
    rounds: int,
    stacked: bool = True,
    size: str = "60m",
) -> dict:
    """Times the whole optimizer of ours and of theirs."""
    params, grads = (llama.block_gradients(size, seed=seed) for seed in (1, 0))
    if not stacked:
        params, grads = llama.unstacked(params), llama.unstacked(grads)
    return _compared(
        _stepper(ours, grads, params), _stepper(theirs, grads, params), rounds
    )


def _stepper(tx, gradients, *params):
    """Returns a function for the next update, and the seconds of its compilation.

    The program of a low-rank transformation leaves renewals out. Before it, an update
    with a renewal fills the bases.
    """
    renew, state, _ = harness.compiled_update(tx, gradients, *params)
    _, state = renew(gradients, state, *params)
    is_ours = bool(lowrank_optax.subspaces(state))
    static = {"refresh": False} if is_ours else {}
    compiled, _, compile_seconds = harness.compiled_update(
        tx, gradients, *params, **static
    )

    def step():
        nonlocal state
        updates, state = compiled(gradients, state, *params)
        return updates

    harness.seconds(lambda: step)
    return lambda: step, compile_seconds


def _compared(ours, theirs, rounds: int) -> dict:
    steps, compile_seconds = zip(ours, theirs, strict=True)
    compiling = dict(zip(("ours", "theirs"), compile_seconds, strict=True))
    return {**harness.paired(*steps, rounds), "compile_seconds": compiling}


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
        f"60m rank 128 side {side}, against optax.contrib.galore": measure(
            "60m", 128, side, rounds, stacked=True
        )
        for side in SIDES
    }
    updates["60m rank 128 side short, not stacked, against optax.contrib.galore"] = (
        measure("60m", 128, "short", rounds, stacked=False)
    )
    adam = {
        "galore": lowrank_optax.galore(1e-3, basis=lowrank_optax.range_finder()),
        "adarankgrad": lowrank_optax.adarankgrad(1e-3),
    }
    for name, ours in adam.items():
        for stacked in (True, False):
            layout = "stacked" if stacked else "not stacked"
            updates[f"60m {name} rank 128, {layout}, against optax.adamw"] = (
                measure_against(ours, optax.adamw(1e-3), rounds, stacked)
            )
    harness.write("update", updates)


if __name__ == "__main__":
    main()
