"""Real text that is on every machine with Python: its standard library's sources."""

import hashlib
import os
import sysconfig
import tokenize
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError

# Not the same on every machine: what was installed, and what some systems package
# separately or remove.
_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_SEPARATE = {"idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}
# Mostly tables; those of `encodings` are near copies of one another, so that some in
# the training part would give away the others in the validation part.
_TABLES = {"test", "tests", "encodings"}
_LEFT_OUT_DIRECTORIES = _INSTALLED | _SEPARATE | _TABLES | {"macholib"}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "sitecustomize", "_distutils_system_mod")
_CLASSES = 20
# Of the 20 classes of paths, one that has 5 % of the files and 5 % of the text.
_VALIDATION_CLASS = 4


class EmbeddedText(NamedTuple):
    """Documents of the standard library, one per file.

    Attributes:
        train: About 95 % of the files, sorted by path.
        validation: The other files, sorted by path.
        undecodable: How many files were left out because their declared encoding
            does not decode them.
    """

    train: list[str]
    validation: list[str]
    undecodable: int


def standard_library(root: Path | None = None) -> EmbeddedText:
    """Reads the ``.py`` files of the standard library, without its tests.

    The same Python version gives the same files in the same order. A file is in the
    validation part when a hash of its relative path says so, hence in every version.

    Args:
        root: Directory of the library; that of the running Python by default.

    Raises:
        UserError: If there are no sources, as in a zipped Python.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train, validation, undecodable = [], [], 0
    for name in _source_files(root):
        try:
            # Decodes by the file's own declaration (PEP 263).
            with tokenize.open(root / name) as file:
                text = file.read()
        except (UnicodeDecodeError, SyntaxError):
            undecodable += 1
            continue
        (validation if _is_validation(name) else train).append(text)
    if not train or not validation:
        raise UserError(
            f"this Python has no sources of its standard library in {root}; "
            "give text of your own with --data PATH"
        )
    return EmbeddedText(train, validation, undecodable)


def _source_files(root):
    """Returns the relative paths, with forward slashes, sorted."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in _LEFT_OUT_DIRECTORIES and not name.startswith("config-")
        ]
        names += [
            Path(directory, name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(_LEFT_OUT_PREFIXES)
        ]
    return sorted(names)


def _is_validation(name):
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _CLASSES == _VALIDATION_CLASS
