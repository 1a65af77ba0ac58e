"""Directories in Hugging Face's layout: tensors opened, checked and written whole."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from experiments.errors import UserError
from experiments.model.config_file import read_json

DTYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of an open file, which :meth:`read` reads.

    Attributes:
        name: Its name in the file.
        handle: The open file.
    """

    name: str
    handle: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Its dtype as the file has it, such as F32 or BF16."""
        return self.handle.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        """Returns its numbers."""
        return self.handle.get_tensor(self.name)


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of ``model.safetensors``, or of its shards, by their names.

    Raises:
        UserError: If a file is missing or unreadable.
    """
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists() and not (directory / "model.safetensors").exists():
        places = read_json(index).get("weight_map", {})
        if not isinstance(places, dict) or not all(
            isinstance(file, str) for file in places.values()
        ):
            raise UserError(f"{index}: weight_map names no files; download it again")
        files = set(places.values())
    tensors = {}
    for file in sorted(files):
        tensors |= open_file(directory / file)
    return tensors


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file, by their names.

    Raises:
        UserError: If it is missing or unreadable.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; put it beside its configuration")
    try:
        handle = safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); download it again"
        ) from error
    return {name: StoredTensor(name, handle) for name in list(handle.keys())}


def check_tensors(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    says: str = "config.json says",
    mend: str = "give weights that belong to the config.json beside them",
) -> None:
    """Checks that the tensors are those of a configuration.

    Args:
        directory: Where they are, for the message.
        tensors: What was found, by the names that ``shapes`` has for it.
        shapes: What is wanted, by name.
        says: What wants these shapes, with its verb, for the message.
        mend: What to do about others, for the message.

    Raises:
        UserError: If a tensor is missing, unexpected, or of another shape or dtype.
    """
    unexpected = {tensors[name].name for name in tensors.keys() - shapes.keys()}
    for problem, names in (
        ("is missing", shapes.keys() - tensors.keys()),
        ("is not expected", unexpected),
    ):
        if names:
            raise UserError(
                f"{directory}: tensor {min(names)} {problem} ({len(names)} in all); "
                f"{mend}"
            )
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape:
            raise UserError(
                f"{directory}: tensor {found.name} has shape {found.shape}, "
                f"{says} {shape}; {mend}"
            )
        if found.dtype not in DTYPES:
            raise UserError(
                f"{directory}: tensor {found.name} has dtype {found.dtype}; "
                f"convert it to one of {', '.join(DTYPES)}"
            )


def param_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Returns "bfloat16" if every tensor is bfloat16, otherwise "float32"."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


@contextlib.contextmanager
def whole_directory(directory: Path, replace: bool) -> Iterator[Path]:
    """Yields a directory to write in, which has the wanted name when it is whole.

    Before, it is called ``.unfinished`` behind that. A current directory, or a mount
    point, gets the files one by one at the end.

    Args:
        directory: Created if absent; must be empty if not.
        replace: Whether the directory may hold something, which is deleted at the end.

    Raises:
        UserError: If the directory is a file, or holds anything that is not to be
            replaced.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a directory to save the model in")
    if directory.exists() and not replace and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; save the model in a new directory")
    # Of a link the directory that it names is replaced.
    place = directory.resolve()
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if place == Path.cwd() or os.path.ismount(place):
        # It cannot be replaced itself.
        for child in place.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        for child in unfinished.iterdir():
            shutil.move(child, place / child.name)
        unfinished.rmdir()
        return
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file of tensors, which whom the umask lets may read."""
    # safetensors writes the buffer as it lies in memory, strides ignored. Hugging
    # Face's loader refuses a file that does not name a format.
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(contiguous, path, metadata={"format": "pt"})
    # safetensors makes a file that its owner alone may read.
    path.chmod(mode)
