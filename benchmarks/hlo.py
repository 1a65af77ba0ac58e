"""The collective operations of a compiled program: kinds, numbers, bytes, loops."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Collective(NamedTuple):
    """A collective operation in a compiled program.

    Attributes:
        kind: "all-gather", "all-reduce", "all-to-all", ...
        numbers: Numbers of the whole array that one group of devices gathers, adds up
            or exchanges.
        bytes: Bytes of this array.
        group: Devices that exchange it.
        trips: Runs per run of the program: the product of the known trip counts of the
            loops around it; None, if one is unknown.
        line: The operation's line.
    """

    kind: str
    numbers: int
    bytes: int
    group: int
    trips: int | None
    line: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run, by a ring's algorithm."""
        others = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * self.bytes * others
        if self.kind in ("all-gather", "reduce-scatter"):
            return self.bytes * others
        own = self.bytes / self.group
        return own if self.kind == "collective-permute" else own * others


KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf" = (.*?) (ragged-all-to-all|{KINDS})(?:-start)?\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
ARRAY = re.compile(r"([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|called_computations)=\{?%?([^,}\s]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{([^=]*)\}")


def collectives(
    hlo: str, devices: int = 8
) -> tuple[list[Collective], list[Collective]]:
    """Returns the collectives of an update outside a refresh, and inside one.

    Outside is what the entry reaches through branch 0, the false one, of each
    conditional; inside is the rest.

    Args:
        hlo: Text of a compiled program, ``jax.jit(f).lower(...).compile().as_text()``.
        devices: Devices of the program.

    Raises:
        ValueError: If the text has a conditional or groups of a form not known here.
    """
    bodies, entry = {}, ""
    for match in COMPUTATION.finditer(hlo):
        bodies[match[2]] = match[0]
        entry = match[2] if match[1] else entry
    if "true_computation" in hlo:
        raise ValueError("a conditional with a form not known here")
    outside = _trips(bodies, entry, every_branch=False)
    everything = _trips(bodies, entry, every_branch=True)
    found = {
        name: _collectives_in(body, everything.get(name), devices)
        for name, body in bodies.items()
    }
    return (
        [x for name in found if name in outside for x in found[name]],
        [x for name in found if name not in outside for x in found[name]],
    )


def _trips(
    bodies: dict[str, str], entry: str, every_branch: bool
) -> dict[str, int | None]:
    """Returns the computations that the entry reaches, and the runs of each."""
    trips: dict[str, int | None] = {}
    waiting: list[tuple[str, int | None]] = [(entry, 1)]
    while waiting:
        name, runs = waiting.pop()
        if name in trips:
            continue
        trips[name] = runs
        for line in bodies[name].splitlines():
            known = TRIPS.search(line)
            inner = (int(known[1]) if known else None) if " while(" in line else 1
            product = None if runs is None or inner is None else runs * inner
            waiting += [(x, product) for x in _called(line, every_branch)]
    return trips


def _called(line: str, every_branch: bool) -> Iterator[str]:
    yield from CALLED.findall(line)
    for names in BRANCHES.findall(line):
        branches = [name.strip().lstrip("%") for name in names.split(",")]
        yield from branches if every_branch else branches[:1]


def _collectives_in(body: str, trips: int | None, devices: int) -> list[Collective]:
    found = []
    for line in body.splitlines():
        if match := COLLECTIVE.search(line):
            numbers = size = 0
            for _, bits, shape in ARRAY.findall(match[1]):
                count = math.prod(map(int, filter(None, shape.split(","))))
                numbers += count
                size += count * max(int(bits or 8), 8) // 8
            kind, group = match[2], _group(line, devices)
            # Gathered and reduced arrays are whole on each device; the others' outputs
            # are one device's part of what moves.
            parts = 1 if kind in ("all-gather", "all-reduce") else group
            found.append(
                Collective(
                    kind, numbers * parts, size * parts, group, trips, line.strip()
                )
            )
    return found


def _group(line: str, devices: int) -> int:
    """Returns the devices that take part in one exchange."""
    if match := PAIRS.search(line):
        return match[1].count("{")
    if match := LISTED_GROUPS.search(line):
        return len(match[1].split(","))
    if match := COUNTED_GROUPS.search(line):
        return int(match[1])
    if match := MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return devices
    raise ValueError(f"groups with a form not known here: {line}")
