"""What one device sends in a training step, by a formula: GB on paper.

A ring of n devices sends (n - 1) / n of the bytes that it gathers or reduces and
scatters, and twice as much of those that it adds up for all. The formula counts
parameters, bases and gradients. ``benchmarks/results/sharded-7b.json`` has the leaves,
and the programs that check it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
# Of the mesh that the formula is checked on, and of others.
CHECKED = "sharded-7b"
OTHERS = ("sharded-7b-256", "sharded-7b-1024", "sharded-7b-data-256")
STEP = "without renewal"
Leaf = Mapping[str, Any]
Rows = Iterator[list[str]]
# Bytes of a number. Parameters and full gradients are bfloat16; bases and gradients in
# subspaces are float32.
FULL, PROJECTED = 2, 4


class Numbers(NamedTuple):
    """Numbers that one device sends in a step without renewal.

    Attributes:
        parameters: Of parameters that are gathered.
        bases: Of bases that are gathered for gradients in subspaces. The update gathers
            them again.
        gradients: Of gradients at full size.
        projected: Of gradients in subspaces.
    """

    parameters: float
    bases: float
    gradients: float
    projected: float


def sent(
    leaves: Iterable[Leaf],
    data: int,
    fsdp: int,
    *,
    in_subspace: bool,
    scatters: bool = True,
) -> Numbers:
    """Returns what one device sends for all leaves.

    Args:
        leaves: From the file.
        data: Devices along data.
        fsdp: Devices along fsdp.
        in_subspace: Whether gradients of projected matrices are inside the subspaces.
        scatters: Whether a gradient is reduced and scattered over fsdp, and not added
            up for all.
    """
    found = [_of_leaf(x, data, fsdp, in_subspace, scatters) for x in leaves]
    return Numbers(*map(math.fsum, zip(*found, strict=True)))


def _of_leaf(leaf, data, fsdp, in_subspace, scatters) -> Numbers:
    shape, cut, rank = leaf["shape"], leaf["cut"], leaf["rank"]
    size = math.prod(shape)
    if leaf["path"] == "embedding" and cut is not None:
        # Devices along fsdp exchange words, and each has its share of the gradient.
        return Numbers(0, 0, 2 * _gathered(size // fsdp, data), 0)
    # Backward recomputes the blocks, and reads the head again.
    gathered = 0 if cut is None else 2 * _gathered(size, fsdp)
    if rank is None or not in_subspace:
        added = _added_up(size, cut is not None, data, fsdp, scatters)
        return Numbers(gathered, 0, added, 0)
    (kept,) = leaf["kept"]
    stack, kept_length = shape[0], shape[kept]
    basis = _gathered(rank * size // kept_length, fsdp)
    coordinates = stack * kept_length * rank
    added = _added_up(coordinates, cut == kept, data, fsdp, scatters)
    return Numbers(gathered, basis, 0, added)


def _gathered(numbers: int, devices: int) -> float:
    return numbers * (devices - 1) / devices


def _added_up(
    numbers: int, is_cut: bool, data: int, fsdp: int, scatters: bool
) -> float:
    """Returns what one device sends for a sum over all devices.

    Of an array that fsdp cuts, each device keeps a share: the sum is scattered over
    fsdp, and the shares are added up over data.
    """
    if not is_cut:
        return 2 * _gathered(numbers, data * fsdp)
    over_fsdp = _gathered(numbers, fsdp) * (1 if scatters else 2)
    return over_fsdp + 2 * _gathered(numbers // fsdp, data)


def compiled(program: Mapping[str, Any], *, is_conditional: bool) -> float:
    """Returns the numbers that one device sends in a compiled step.

    Args:
        program: From the file. The CPU backend makes all of its numbers float32.
        is_conditional: Whether to count the update's own exchanges, and not the rest.
    """
    rows = program["collectives"]
    return sum(x["sent"] / 4 for x in rows if x["conditional"] == is_conditional)


def measurements(name: str) -> dict[str, Any]:
    """Returns the measurements of a file."""
    return json.loads((RESULTS / f"{name}.json").read_text())["measurements"]


def of_mesh(found: Mapping[str, Any], optimizer: str, *, scatters: bool) -> Numbers:
    """Returns the formula's numbers for an optimizer on the mesh of a file."""
    one, mesh = found["optimizers"][optimizer], found["mesh"]
    return sent(
        one["leaves"],
        mesh["data"],
        mesh["fsdp"],
        in_subspace=one["programs"][STEP]["gradients"] == "subspace",
        scatters=scatters,
    )


def compiled_steps() -> Rows:
    yield [
        *("optimizer", "program", "gradients", "compilation, s", "arguments, GB"),
        *("of the plan", "temporaries, GB", "sent, GB in float32"),
    ]
    for optimizer, one in measurements(CHECKED)["optimizers"].items():
        for name, program in one["programs"].items():
            size = program["bytes"]
            numbers = [compiled(program, is_conditional=x) for x in (False, True)]
            yield [
                *(f"`{optimizer}`", name, program["gradients"]),
                f"{program['compile_seconds']:.0f}",
                f"{size['arguments'] / 1e9:.3f}",
                f"{program['of_plan']:.4f}",
                f"{size['temporaries'] / 1e9:.2f}",
                f"{4 * sum(numbers) / 1e9:.1f}",
            ]


def check() -> Rows:
    yield ["10^9 numbers that a device sends", "by the formula", "compiled", "apart"]
    found = measurements(CHECKED)
    for optimizer, one in found["optimizers"].items():
        ours = sum(of_mesh(found, optimizer, scatters=False))
        theirs = compiled(one["programs"][STEP], is_conditional=False)
        yield [
            f"`{optimizer}`",
            f"{ours / 1e9:.3f}",
            f"{theirs / 1e9:.3f}",
            f"{ours / theirs - 1:+.1%}",
        ]


def on_paper() -> Rows:
    yield [
        *("GB a step and device", "data x fsdp", "parameters", "bases", "gradients"),
        *("update", "in all", "against AdamW"),
    ]
    for file in (CHECKED, *OTHERS):
        found, in_all = measurements(file), {}
        for optimizer, one in found["optimizers"].items():
            numbers = of_mesh(found, optimizer, scatters=True)
            of_update = compiled(one["programs"][STEP], is_conditional=True)
            parts = (
                FULL * numbers.parameters,
                PROJECTED * numbers.bases,
                FULL * numbers.gradients + PROJECTED * numbers.projected,
                PROJECTED * of_update,
            )
            in_all[optimizer] = sum(parts)
            yield [
                f"`{optimizer}`",
                f"{found['mesh']['data']} x {found['mesh']['fsdp']}",
                *(f"{part / 1e9:.2f}" for part in (*parts, sum(parts))),
                f"{in_all[optimizer] / in_all['adamw']:.2f}",
            ]


TABLES = {
    "sharded-compile": compiled_steps,
    "bytes-moved-check": check,
    "bytes-moved": on_paper,
}
