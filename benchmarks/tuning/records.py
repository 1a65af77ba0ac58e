"""The lines of JSON that runs are recorded in."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def read(paths: Iterable[Path]) -> list[Record]:
    """Returns the records of some files."""
    lines = (line for path in paths for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines]


def matching(records: Iterable[Record], key: Record) -> Record | None:
    """Returns the first record with these entries, or None."""
    for record in records:
        if all(record.get(name) == value for name, value in key.items()):
            return record
    return None
