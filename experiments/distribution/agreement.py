"""That all processes of a run were started alike: the same flags, the same versions."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from experiments.distribution import processes
from experiments.errors import UserError

_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "grain", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Returns the versions that what is computed, or stored, may depend on."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Checks that this process has the settings and versions of all others.

    Args:
        settings: Name, as it is told -> value, as JSON knows it.

    Raises:
        UserError: If they differ, in all processes. It names each difference.
    """
    own = {**{k: str(v) for k, v in settings.items()}, **versions()}
    first, *others = map(json.loads, processes.of_all("agreement", json.dumps(own)))
    found = [
        f"process {i} has {name} {other.get(name)}, process 0 has {first.get(name)}"
        for i, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if found:
        raise UserError(
            f"the processes of this run differ: {'; '.join(found)}; start all with the "
            "same flags and packages"
        )
