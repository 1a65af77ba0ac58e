"""That all processes of a run were started alike: the same flags, the same versions."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.distribution import processes
from experiments.errors import UserError

# What is computed, or stored, may depend on them.
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "grain", "orbax-checkpoint")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of packages, by their names.

    Args:
        packages: Names of distributions. One that is imported may not be installed.
    """
    return {"python": platform.python_version(), **{x: _version(x) for x in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_agreement(settings: Mapping[str, Any], what: str, advice: str) -> None:
    """Checks that this process has the settings and versions of all others.

    Args:
        settings: Name, as it is told -> value, as JSON knows it.
        what: Name of the settings, not used before.
        advice: What to do if they differ.

    Raises:
        UserError: If they differ, in all processes. It names each difference.
    """
    own = {**{k: str(v) for k, v in settings.items()}, **versions(_PACKAGES)}
    first, *others = map(json.loads, processes.of_all(what, json.dumps(own)))
    found = [
        f"process {i} has {name} {other.get(name)}, process 0 has {first.get(name)}"
        for i, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if found:
        raise UserError(
            f"the processes of this run differ: {'; '.join(found)}; {advice}"
        )
