"""The units of measurement, the most important first."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.accelerator import records, steps, updates

BYTE_LIMIT = 24 * 10**9  # of stage d
_STACKED = ("range_finder(0.5)", "adarankgrad", "low_rank_muon")
_BASES = ("range_finder(0)", "range_finder(0.5)", "range_finder(1)", "range_finder(2)")
_TOY = (
    *(("vocab_size", 96), ("hidden_size", 64), ("num_layers", 2)),
    *(("num_heads", 2), ("num_kv_heads", 2)),
    # XLA's CPU backend lacks some products of bfloat16 matrices into float32.
    ("compute_dtype", "float32"),
)
# Kinds of steps: whether gradients are inside subspaces, and whether bases are renewed.
_FULL: dict[str, Any] = {"in_subspace": False}
_SUBSPACE: dict[str, Any] = {"in_subspace": True}
_RENEWING: dict[str, Any] = {"in_subspace": True, "renews": True}
_Rows = Sequence[tuple[str, dict[str, Any]]]
_TOY_UPDATE = {"kernels": ("down",), "seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class Unit:
    """One measurement.

    Attributes:
        stage: "a", "b", "c" or "d".
        name: Name inside the stage.
        process: Name of the process. Successive units with the same name share it.
        least: Seconds that must be left at the start of the unit.
        most: Seconds after which the unit is stopped.
        measure: Function of ``write`` and the deadline.
        byte_limit: Limit on the device's allocator in bytes; None: no limit.
    """

    stage: str
    name: str
    process: str
    least: float
    most: float
    measure: Callable[[records.Write, float], None]
    byte_limit: int | None = None


def catalogue(is_smoke: bool) -> list[Unit]:
    """Returns the units in their order; for a smoke test, toys of all units."""
    return _toys() if is_smoke else _all()


def _all() -> list[Unit]:
    telling: _Rows = (
        ("adamw", _FULL),
        ("adarankgrad", _SUBSPACE),
        ("adarankgrad", _RENEWING),
        ("contrib.muon", _FULL),
        ("sumo", _SUBSPACE),
        ("low_rank_muon 8-bit", _FULL),
        ("contrib.galore", _FULL),
    )
    others: _Rows = (
        ("galore", _SUBSPACE),
        ("sumo", _RENEWING),
        ("galore", _FULL),
        ("adarankgrad", _FULL),
    )
    sizes = {"350m": 256, "1b": 512}

    def of_steps(size: str, rows: _Rows):
        for optimizer, kind in rows:
            case = steps.Case(size, optimizer, sizes[size], sequences=16, **kind)
            yield _step_unit("b", case, least=25, most=90)

    def of_24_gb(optimizer):
        case = steps.Case("7b", optimizer, 256, True, 2, byte_limit=BYTE_LIMIT)
        return _step_unit("d", case, least=40, most=120)

    return [
        *of_steps("350m", telling),
        *of_steps("1b", telling),
        of_24_gb("galore 8-bit, basis 8-bit"),
        *_update_units("60m", is_stacked=True, apart=("contrib.galore",)),
        *_update_units("1b", is_stacked=True),
        _refresh_unit("60m"),
        _refresh_unit("1b-one-layer"),
        of_24_gb("adarankgrad 8-bit, basis 4-bit"),
        *of_steps("350m", others),
        *_update_units("60m", is_stacked=False, apart=("contrib.galore",)),
        *of_steps("1b", others),
        *_update_units("1b", is_stacked=False),
    ]


def _toys() -> list[Unit]:
    rows: _Rows = [
        *((name, _SUBSPACE) for name in ("galore", "adarankgrad", "sumo")),
        ("adarankgrad", _RENEWING),
        *((name, _FULL) for name in steps.THEIRS),
        ("low_rank_muon 8-bit", _FULL),
    ]
    toy = functools.partial(steps.Case, "tiny", rank=8, sequences=2, tokens=16)
    toy = functools.partial(toy, overrides=_TOY)
    limited = toy("galore 8-bit, basis 8-bit", in_subspace=True, byte_limit=BYTE_LIMIT)
    units = [
        *(_step_unit("b", toy(name, **kind), 5, 30) for name, kind in rows),
        _step_unit("d", limited, 5, 30),
        *_update_units("toy", True, ("contrib.galore",), **_TOY_UPDATE),
        *_update_units("toy", False, ("contrib.galore",), **_TOY_UPDATE),
        _refresh_unit("toy", **_TOY_UPDATE),
    ]
    # A CPU has no peak to measure, and starting a process takes seconds.
    return [dataclasses.replace(unit, process=unit.stage) for unit in units]


def _step_unit(stage: str, case: steps.Case, least: float, most: float) -> Unit:
    kind = "subspace" if case.in_subspace else "full"
    name = f"{case.model} {case.optimizer}, {kind} gradients"
    if case.renews:
        name += ", renewing every basis"
    measure = functools.partial(_measure_step, case)
    return Unit(stage, name, name, least, most, measure, case.byte_limit)


def _measure_step(case: steps.Case, write: records.Write, deadline: float) -> None:
    steps.measure(write, case, deadline)


def _update_units(
    size: str, is_stacked: bool, apart: tuple[str, ...] = (), **options
) -> list[Unit]:
    """Returns a unit for an update without renewal, and one with renewal."""
    layout = "stacked" if is_stacked else "not stacked"
    theirs = ("adamw", "contrib.galore", "contrib.muon")

    def unit(kind, renews, together, apart):
        case = updates.Case(size, is_stacked, renews, **options)
        measure = functools.partial(_measure_update, case, together, apart)
        process = f"{size}, {layout}"
        return Unit("a", f"{process}, {kind}", process, 20, 70, measure)

    return [
        unit("without renewal", False, (*theirs, *_STACKED), ()),
        unit("with renewal", True, ("adamw", *_STACKED), apart),
    ]


def _refresh_unit(size: str, **options) -> Unit:
    # At rank 512 an exact SVD of a layer of 1b takes seconds: slow units come apart.
    case = updates.Case(size, is_stacked=True, renews=True, **options)
    apart = ("contrib.galore", "exact_svd")
    measure = functools.partial(_measure_update, case, _BASES, apart)
    return Unit("c", size, f"c {size}", 20, 90, measure)


def _measure_update(
    case: updates.Case,
    together: tuple[str, ...],
    apart: tuple[str, ...],
    write: records.Write,
    deadline: float,
) -> None:
    updates.measure(write, case, together, apart, deadline)
