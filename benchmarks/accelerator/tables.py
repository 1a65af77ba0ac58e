"""The results of a stage in a few lines of text."""

from collections.abc import Iterator
from typing import Any


def text(stage: str, record: dict[str, Any]) -> str:
    """Returns the table of a stage."""
    rows = _step_rows if stage in "bd" else _update_rows
    lines = [row for name, x in record["measurements"].items() for row in rows(name, x)]
    title = f"stage {stage}, {record['environment']['device']}"
    return "\n".join([title, *_aligned(lines)])


def _step_rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if "milliseconds" not in result:
        yield name, _why_not(result)
        return
    planned, seen = result["planned_bytes"], result["bytes"]
    yield (
        name,
        f"{result['tokens_per_second']:,.0f} tokens/s",
        _milliseconds(result),
        f"peak {_gigabytes(seen['peak'])}, planned {_gigabytes(planned['peak'])}",
        f"state {_gigabytes(planned['state'])}",
        f"compile {result['compile_seconds']:.0f} s",
    )


def _update_rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield name, ("" if "finished" in result else _why_not(result))
    for alternative, row in result.get("alternatives", {}).items():
        if "milliseconds" not in row:
            yield f"  {alternative}", _why_not(row)
            continue
        ratios = (
            f"{row[f'ratio_to_{base}']:.3f} of {base}"
            for base in ("adamw", "contrib.galore")
            if f"ratio_to_{base}" in row
        )
        compiling = row["trace_seconds"] + row["compile_seconds"]
        yield (
            f"  {alternative}",
            _milliseconds(row),
            f"trace and compile {compiling:.1f} s",
            *ratios,
        )


def _milliseconds(row: dict[str, Any]) -> str:
    found = row["milliseconds"]
    return f"{found['median']:.2f} ms ({found['min']:.2f} to {found['max']:.2f})"


def _gigabytes(size: int | None) -> str:
    return "not known" if size is None else f"{size / 1e9:.2f} GB"


def _why_not(result: dict[str, Any]) -> str:
    for key in ("error", "skipped"):
        if key in result:
            return f"{key}: {result[key].splitlines()[0][:100]}"
    return "not finished"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    width = max((len(row[0]) for row in rows), default=0)
    return [f"{row[0]:{width}}  {'  '.join(row[1:])}".rstrip() for row in rows]
