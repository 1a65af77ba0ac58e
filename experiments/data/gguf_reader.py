"""A GGUF file, read once: what it says of its model, and its tensors."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.extras import import_extra

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open file.

    Attributes:
        path: Where it is.
        fields: What it says: numbers, strings, and lists of them, by name.
        tensors: ``gguf.ReaderTensor`` by name, whose data are read when they are used.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def field(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns what the file says under a name.

        Args:
            name: Such as "llama.block_count".
            kind: Type of the value.
            default: Of a field that is not there.

        Raises:
            UserError: If a field without a default is not there, or of another type.
        """
        value = self.fields.get(name, default)
        if value is _REQUIRED:
            raise UserError(
                f"{self.path}: the field {name} is missing; convert it anew"
            )
        if value is not default and not isinstance(value, kind):
            raise UserError(
                f"{self.path}: the field {name} is {str(value)[:40]}; "
                f"it must be of type {kind.__name__}"
            )
        return value


def is_gguf(path: str | Path) -> bool:
    """Returns whether a path is of a GGUF file, by its name."""
    return Path(path).suffix == ".gguf"


def open_gguf(path: str | Path) -> GgufFile:
    """Reads what a GGUF file says; the last file stays open.

    Raises:
        UserError: If the package ``gguf`` is not installed, or the file cannot be read.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    return _opened(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, *changed: int) -> GgufFile:
    """Opens the file; ``changed`` tells a new file at the path from the old one."""
    del changed
    gguf = import_extra("gguf", f"{path} needs the package gguf", "finetune")

    class Reader(gguf.GGUFReader):
        """Slices an array and not a ``memmap``, which takes three times as long."""

        def _get(self, *args: Any, **kwargs: Any) -> np.ndarray:
            self.data = np.asarray(self.data)
            return super()._get(*args, **kwargs)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(
            f"{path} is not a GGUF file that can be read ({error}); download it again"
        ) from error
    return GgufFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})
