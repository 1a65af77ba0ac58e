"""How much a loss hangs on rounding: runs on one device, with weights changed by 1e-7.

``python -m benchmarks.rounding --save`` runs each optimizer of
:mod:`benchmarks.meshes` from the same weights, and from weights that are changed by
1e-7 of their size: about the rounding of float32. It writes
``benchmarks/results/rounding.json``. A mesh adds up in another order, and can be no
nearer to one device than these runs are to each other.
"""

import json

from benchmarks.harness import RESULTS
from benchmarks.meshes import arguments_of, run

FILE = RESULTS / "rounding.json"
NOISE = 1e-7


def main() -> None:
    """Runs, prints, and writes the differences if asked to."""
    arguments = arguments_of(__doc__)
    found = json.loads(FILE.read_text()) if arguments.save and FILE.exists() else []
    for method in arguments.methods:
        pair = [run(method, None, arguments, noise) for noise in (0.0, NOISE)]
        one, other = (row["losses"] for row in pair)
        row = {
            "model": pair[0]["model"],
            "optimizer": method,
            "noise": NOISE,
            "relative": {step: other[step] / one[step] - 1 for step in one},
        }
        print(json.dumps(row), flush=True)
        names = ("model", "optimizer")
        found = [x for x in found if any(x[name] != row[name] for name in names)]
        found.append(row)
        if arguments.save:
            FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
