"""Tables of the collectives in training steps, from ``results/collectives.json``."""

from collections.abc import Iterable, Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "all-to-all")


def operations(rows: Iterable[dict[str, Any]]) -> int:
    """Returns the collective operations in a program, those in loops once."""
    return sum(row["operations"] for row in rows)


def total(rows: Iterable[dict[str, Any]], field: str) -> float:
    """Returns the sum of a field over all runs of the operations."""
    return sum(row[field] * row["operations"] * row["trips"] for row in rows)


def table(mesh: str, measurements: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the heads of a mesh's table, and a row for each optimizer.

    Args:
        mesh: The mesh, as ``--mesh`` has it.
        measurements: What :mod:`benchmarks.collectives` writes.
    """
    few, middle, many = measurements[mesh][0]["collectives"]
    has_bound = "of_a_plus_b_times_r" in measurements[mesh][0]
    yield [
        f"`--mesh {mesh}`",
        "gradients",
        f"operations, {few} layers",
        f"{middle}",
        f"{many}",
        f"in loops, {middle}",
        *(f"{kind}, MB" for kind in KINDS),
        "one device sends, MB",
        *(["of (a + b) r"] if has_bound else []),
    ]
    for one in measurements[mesh]:
        rows = one["collectives"][middle]
        sizes = (total((x for x in rows if x["kind"] == k), "bytes") for k in KINDS)
        yield [
            f"`{one['optimizer']}`",
            one["gradients"],
            *(str(operations(one["collectives"][n])) for n in (few, middle, many)),
            str(operations(x for x in rows if x["trips"] > 1)),
            *(f"{size / 1e6:.2f}" for size in sizes),
            f"{total(rows, 'sent') / 1e6:.1f}",
            *([f"{one['of_a_plus_b_times_r']:.2f}"] if has_bound else []),
        ]


def clipping(measurements: dict[str, Any]) -> Iterator[list[str]]:
    """Yields what clipping by the norm adds to a step."""
    yield ["clipping by the norm adds", "gradients", "mesh", "operations", "numbers"]
    for mesh, rows in measurements.items():
        for one in rows:
            if added := one.get("clipping"):
                yield [
                    f"`{one['optimizer']}`",
                    one["gradients"],
                    f"`{mesh}`",
                    *(f"{added[key]:.0f}" for key in ("operations", "numbers")),
                ]
