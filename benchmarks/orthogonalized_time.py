"""Time of an update outside a refresh, of sumo and low_rank_muon against Muon.

The whole optimizers are compared, with ``optax.contrib.muon``, in float32.
"""

import argparse

import lowrank_optax
from benchmarks import harness
from benchmarks.accelerator.stacks import muon_of_stacks
from benchmarks.update_time import measure_against

METHODS = (lowrank_optax.sumo, lowrank_optax.low_rank_muon)
# Size -> ranks and whether layers are stacked.
CASES = {
    "60m": ((128, True), (256, True), (128, False)),
    "1b-one-layer": ((512, True),),
}


def against_muon(size: str, rounds: int) -> dict[str, dict]:
    """Returns the pairs of a size's cases by their names."""
    never = lowrank_optax.every(10**6, stagger=False)
    found = {}
    for rank, stacked in CASES[size]:
        for method in METHODS:
            ours, theirs = method(1e-3, rank, refresh=never), muon_of_stacks(1e-3)
            name = f"{method.__name__} rank {rank}"
            name += "" if stacked else ", not stacked"
            found[name] = measure_against(ours, theirs, rounds, stacked, size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=CASES, default="60m")
    parser.add_argument("--rounds", type=int, default=10, help="timed pairs per case")
    args = parser.parse_args()
    harness.write(f"muon-update-{args.size}", against_muon(args.size, args.rounds))


if __name__ == "__main__":
    main()
