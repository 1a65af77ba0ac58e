"""Tables of whole runs: a state on the host, checkpoints, meshes."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.meshes import METHODS

RESULTS = Path(__file__).resolve().parent / "results"

Rows = Iterator[list[str]]


def host_memory() -> Rows:
    """Yields the rows of ``results/host-memory-h200.json``."""
    yield [
        *("optimizer", "state, GB", "peak, GB", "with `pinned_host`"),
        *("ms a step", "with `pinned_host`", "ratio"),
    ]
    found = json.loads((RESULTS / "host-memory-h200.json").read_text())
    for name, row in found["rows"].items():
        device, pinned = row["device"], row["pinned_host"]
        times = row.get("milliseconds")
        cells = ["not measured", "", ""]
        if times:
            medians = [times[kind]["median"] for kind in ("device", "pinned_host")]
            cells = [f"{x:.1f}" for x in medians]
            cells.append(f"{medians[1] / medians[0]:.2f}")
        peaks = [x["device_peak_bytes"] for x in (device, pinned)]
        yield [
            f"`{name}`",
            f"{device['state_bytes'] / 1e9:.2f}",
            *(f"{x / 1e9:.2f}" for x in peaks),
            *cells,
        ]


def saving() -> Rows:
    """Yields the rows of the files ``results/saving-*.json``."""
    yield [
        *("device", "model", "optimizer", "saved, MB", "ms a step", "the call, ms"),
        *("written after, ms", "steps meanwhile / without"),
    ]
    for path in sorted(RESULTS.glob("saving-*.json")):
        found = json.loads(path.read_text())
        summary, options = found["summary"], found["options"]
        ratios = (summary[f"ratio_{name}"] for name in ("median", "min", "max"))
        median, least, most = (f"{ratio:.2f}" for ratio in ratios)
        yield [
            found["environment"]["device"].partition(": ")[2],
            options["model"],
            f"`{options['optimizer']}`",
            f"{found['rounds'][0]['bytes'] / 1e6:.0f}",
            *(
                f"{1e3 * summary[f'{name}_seconds']:.1f}"
                for name in ("step", "save_call", "written_after")
            ),
            f"{median} ({least} to {most})",
        ]


def meshes() -> Rows:
    """Yields the rows of ``results/meshes.json`` beside ``results/rounding.json``."""
    fsdp = {2: "data=4,fsdp=2", 4: "data=2,fsdp=4", 8: "fsdp=8"}
    yield [
        *("model", "optimizer", "largest difference of the loss"),
        *("of one device, by 1e-7", "the same, at any step"),
        *(f"state, fsdp {size}" for size in fsdp),
    ]
    rounding = {
        (row["model"], row["optimizer"]): row["relative"]
        for row in json.loads((RESULTS / "rounding.json").read_text())
    }
    found = json.loads((RESULTS / "meshes.json").read_text())
    found.sort(key=lambda x: (x["model"], METHODS.index(x["optimizer"])))
    for name, group in itertools.groupby(
        found, lambda row: (row["model"], row["optimizer"])
    ):
        one, *others = group
        state = {x["mesh"]: x["bytes_per_device"]["optimizer_state"] for x in others}
        largest = max(abs(x["loss"] / one["loss"] - 1) for x in others)
        own = [abs(x) for x in rounding.get(name, {}).values()]
        yield [
            name[0],
            f"`{name[1]}`",
            f"{largest:.1e}",
            *([f"{own[-1]:.1e}", f"{max(own):.1e}"] if own else ["", ""]),
            *(
                f"{state[mesh] / one['bytes_per_device']['optimizer_state']:.3f}"
                for mesh in fsdp.values()
            ),
        ]


TABLES = {"host-memory": host_memory, "saving": saving, "meshes": meshes}
