"""Which parameters a fine-tuning run trains: their groups, and those it freezes."""

import dataclasses
import re
from typing import Any

import jax

from experiments.errors import UserError
from experiments.model.groups import parameter_groups
from experiments.optim.methods import OPTIMIZERS
from experiments.tuning.flags import TuningConfig

# Groups that LoRA trains.
_OF_ADAPTERS = ("blocks", "classifier")


def groups_of(config: TuningConfig, params: Any) -> Any:
    """Returns a tree like ``params`` of the groups' names, "frozen" among them.

    Beside what ``--frozen`` finds, LoRA and ReLoRA freeze all but their adapters and an
    encoder's head.
    """
    keeps = OPTIMIZERS[config.optimizer].adapters in ("lora", "relora")
    pattern = None if config.frozen is None else re.compile(config.frozen)

    def group(path, name):
        is_found = pattern is not None and pattern.search(leaf_name(path))
        return "frozen" if is_found or (keeps and name not in _OF_ADAPTERS) else name

    return jax.tree_util.tree_map_with_path(group, parameter_groups(params))


def without_frozen(config: TuningConfig, params: Any) -> Any:
    """Returns the parameters; no gradient flows to those that are frozen."""
    return jax.tree.map(
        lambda leaf, group: jax.lax.stop_gradient(leaf) if group == "frozen" else leaf,
        params,
        groups_of(config, params),
    )


def check_frozen(config: TuningConfig, params: Any) -> None:
    """Checks what ``--frozen`` finds.

    Args:
        config: Of the run, checked.
        params: Parameters, or their shapes.

    Raises:
        UserError: If it finds nothing or everything, or leaves no change for
            ``--save-adapter``.
    """
    if config.frozen is None:
        return
    pattern = re.compile(config.frozen)
    groups = groups_of(dataclasses.replace(config, frozen=None), params)
    names = [
        leaf_name(path)
        for path, group in jax.tree.leaves_with_path(groups)
        if group != "frozen"
    ]
    if not any(map(pattern.search, names)):
        raise UserError(
            f"--frozen {config.frozen} finds no parameter that is trained; their names "
            f"are {', '.join(names)}"
        )
    groups = set(jax.tree.leaves(groups_of(config, params)))
    if groups == {"frozen"}:
        raise UserError(f"--frozen {config.frozen} leaves nothing to train")
    if config.save_adapter is not None and "blocks" not in groups:
        raise UserError(
            f"--frozen {config.frozen} leaves no block matrix to train, and "
            "--save-adapter writes the changes of these; leave one of them out"
        )


def leaf_name(path: tuple) -> str:
    """Returns the name of a parameter, such as blocks/mlp/up/kernel.

    An adapter's two arrays have that of their matrix: blocks/mlp/up/kernel/down.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.startswith("adapters/"):
        name = name.removeprefix("adapters/").replace(".", "/")
    return name.removeprefix("model/")
