"""Tables of what a run does beside its step: a state on the host, checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

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


TABLES = {"host-memory": host_memory, "saving": saving}
