"""Runs the authors' optimizers in PyTorch, from checkouts of their code.

This file has none of the authors' code: it imports their modules from the user's
checkouts. These modules import packages that the comparison does not need:
``transformers`` for a version check, ``tensorly`` for tensors of more axes. A missing
package is replaced by an empty module.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# name: checkout, package, module, class
MODULES = {
    "galore": ("GaLore", "galore_torch", "adamw", "AdamW"),
    "fira": ("Fira", "optimizer_torch", "fira_adamw", "AdamW"),
    "apollo": ("APOLLO", "apollo_torch", "apollo", "AdamW"),
    "ldadam": ("LDAdam", "ldadamw_torch", "ldadamw", "LDAdamW"),
}


class Run(NamedTuple):
    """The steps of one authors' optimizer.

    Attributes:
        updates: Difference of the parameter before and after a step at learning rate 1;
            (steps, n, m).
        bases: The projection in use, as columns of the short side; (steps, b, r).
    """

    updates: np.ndarray
    bases: np.ndarray


def run(
    checkouts: Path, name: str, gradients: np.ndarray, group: dict, **options: Any
) -> Run:
    """Returns the steps of an optimizer on one matrix.

    Args:
        checkouts: Folder with a checkout of each repository, under the repository's
            name.
        name: Key of :data:`MODULES`.
        gradients: (steps, n, m), float32.
        group: Further entries of the authors' parameter group.
        options: Options of the optimizer.
    """
    torch = importlib.import_module("torch")
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1:]))
    optimizer = _load(checkouts, name)([{"params": [parameter], **group}], **options)
    updates, bases = [], []
    for gradient in gradients:
        # The parameter starts at zero, so that no sum loses digits. The gradient is
        # added to the error buffer that LDAdam's zero_grad may leave there.
        parameter.data.zero_()
        kept = 0 if parameter.grad is None else parameter.grad
        parameter.grad = torch.tensor(gradient) + kept
        optimizer.step()
        optimizer.zero_grad()
        updates.append(-parameter.data.numpy().copy())
        state = optimizer.state[parameter]
        projector = state.get("projector") or state["previous_projector"]
        basis = projector.ortho_matrix.numpy().copy()
        n, m = gradient.shape
        bases.append(basis if n < m else basis.T)
    return Run(np.asarray(updates), np.asarray(bases))


def _load(checkouts: Path, name: str) -> Any:
    """Returns one of the authors' classes, without their packages' other imports."""
    checkout, package, module, attribute = MODULES[name]
    folder = checkouts / checkout / package
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing; see the head of benchmarks/parity.py.")
    versions = _module("transformers.utils.versions")
    versions.require_version = getattr(versions, "require_version", lambda _: None)
    tensorly, decomposition = _module("tensorly"), _module("tensorly.decomposition")
    tensorly.tenalg = getattr(tensorly, "tenalg", None)
    decomposition.tucker = getattr(decomposition, "tucker", None)
    root = types.ModuleType(package)
    root.__path__ = [str(folder)]
    sys.modules[package] = root
    return getattr(importlib.import_module(f"{package}.{module}"), attribute)


def _module(name: str) -> Any:
    """Returns a module, or an empty module if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            each = ".".join(parts[:end])
            sys.modules.setdefault(each, types.ModuleType(each))
        return sys.modules[name]
