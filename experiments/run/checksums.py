"""Checksums of the files in a directory's folders: whether they are as written."""

import hashlib
import json
from pathlib import Path

FILE = "checksums.json"


def write_checksums(directory: Path) -> None:
    """Writes the checksum of every file in a directory's folders to checksums.json."""
    sums = {
        str(path.relative_to(directory)): _checksum(path)
        for path in sorted(directory.glob("*/**/*"))
        if path.is_file()
    }
    (directory / FILE).write_text(json.dumps(sums, indent=1) + "\n")


def first_damage(directory: Path) -> str | None:
    """Returns which file is not as it was written, and what is wrong with it.

    None: all of them are whole. Files that joined them later are not looked at.
    """
    try:
        sums = json.loads((directory / FILE).read_text())
    except FileNotFoundError:
        return f"{FILE} is missing"
    except ValueError:
        return f"{FILE} cannot be read"
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} does not have its checksum"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
