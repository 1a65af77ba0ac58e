"""Packages that only some runs need: imported late, and missed in one line."""

import importlib
from typing import Any

from experiments.errors import UserError


def import_extra(module: str, needs: str, extra: str, otherwise: str = "") -> Any:
    """Returns a module of an extra of ``pyproject.toml``.

    Args:
        module: Its dotted name.
        needs: What needs it, for the message, and what the package is called:
            "a chat template needs the package jinja2".
        extra: The extra that installs it.
        otherwise: What else the user may do: "leave out --wandb".

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{needs}; install it with pip install -c constraints.txt "
            f"-e '.[{extra}]' in this clone" + (otherwise and f", or {otherwise}")
        ) from error
