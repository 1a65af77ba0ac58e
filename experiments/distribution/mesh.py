"""The mesh of a run: all devices of all processes, by the flag ``--mesh``."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import UserError
from experiments.model.rows import BATCH_AXES

# data: copies of the model, each with its share of the batch. fsdp: the same, but each
# has a share of the parameters too. tensor: shares of heads and of the MLP.
AXES = (*BATCH_AXES, "tensor")
_AUTOMATIC = (AxisType.Auto,) * len(AXES)


def axis_sizes(text: str | None, devices: int) -> tuple[int, ...]:
    """Returns the devices along each of :data:`AXES`.

    Args:
        text: ``data=2,fsdp=4``: an axis without a size has 1, but data has what is
            left. None: all devices are on data.
        devices: In all.

    Raises:
        UserError: If the text is none of this, or does not multiply to the devices.
    """
    given = _parsed(text or "")
    others = math.prod(size for name, size in given.items() if name != "data")
    sizes = {"data": devices // others if devices % others == 0 else 1} | given
    found = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(found) != devices:
        shape = " x ".join(f"{n} {s}" for n, s in zip(AXES, found, strict=True))
        raise UserError(
            f"--mesh {text} is {shape} = {math.prod(found)} devices, but there are "
            f"{devices}; choose sizes whose product is {devices}"
        )
    return found


def _parsed(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if not found or found[1] not in AXES or found[1] in sizes:
            raise UserError(
                f"--mesh {text}: {part!r} is not one of {', '.join(AXES)} with a size "
                "of at least 1, once each; give it like data=2,fsdp=4"
            )
        sizes[found[1]] = int(found[2])
    return sizes


def make_mesh(text: str | None, batch_size: int, accumulate: int = 1) -> Mesh:
    """Returns the mesh of a run, with automatic axes :data:`AXES`.

    Args:
        text: The flag ``--mesh``, see :func:`axis_sizes`.
        batch_size: Sequences of a batch.
        accumulate: Micro-batches of a batch.

    Raises:
        UserError: See :func:`axis_sizes`; or if the sequences of a micro-batch cannot
            be shared out evenly.
    """
    devices = all_devices()
    mesh = _mesh(axis_sizes(text, len(devices)), devices)
    shares = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if batch_size % (shares * accumulate):
        times = f", times --accumulate {accumulate}" if accumulate > 1 else ""
        over = f"{len(devices)} devices"
        if shares < len(devices):
            over = f"{shares} shares, data x fsdp, that --mesh {text} cuts it into"
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of the {over}{times}; choose "
            "one that is"
        )
    return mesh


def planned_mesh(text: str) -> AbstractMesh:
    """Returns a mesh of devices that this machine need not have.

    Args:
        text: The flag ``--mesh``. As many devices are planned as it has: an axis
            without a size has 1, data too.

    Raises:
        UserError: See :func:`axis_sizes`.
    """
    sizes = axis_sizes(text, math.prod(_parsed(text).values()))
    return AbstractMesh(sizes, AXES, axis_types=_AUTOMATIC)


def all_devices() -> Sequence[Any]:
    """Returns the devices of all processes."""
    return jax.devices()


def mesh_of_one() -> Mesh:
    """Returns the mesh of this process's first device alone."""
    return _mesh((1,) * len(AXES), jax.local_devices()[:1])


def _mesh(sizes: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=_AUTOMATIC, devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that each device has a whole copy of."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's array, whose first axis counts sequences."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
