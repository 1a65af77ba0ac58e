"""Adapters in PEFT's layout: ``adapter_config.json``, ``adapter_model.safetensors``.

A tensor ``lora_A.weight`` (r, in) is our down, transposed, and ``lora_B.weight`` (out,
r) our up; there is one of each per layer. What is saved as a whole, an encoder's
classifier and pooler, has the names of Hugging Face's layout. All names begin with
``base_model.model.``.
"""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.errors import UserError
from experiments.model import encoder_files, hugging_face
from experiments.model.adapters import block_matrices, merged
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.peft_config import (
    PeftConfig,
    read_peft_config,
    write_peft_config,
)
from experiments.model.safetensors_files import (
    StoredTensor,
    check_tensors,
    open_file,
    whole_directory,
    write_tensors,
)
from experiments.model.shape import LlamaConfig
from experiments.model.tensor_layout import TreePath, flipped, is_stacked

Config = LlamaConfig | EncoderConfig

# What is saved as a whole, in our tree, and PEFT's names of the modules around it.
WHOLE = ("classifier", "pooler")
_MODULES_TO_SAVE = {"bert": ["classifier", "pooler"], "roberta": ["classifier"]}

_PREFIX = "base_model.model."
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def save_peft_adapter(
    directory: str | Path,
    params: Any,
    config: Config,
    base_model: str,
    scale: float = 1.0,
    replace: bool = False,
) -> None:
    """Writes adapters as a directory that ``peft.PeftModel.from_pretrained`` reads.

    Zeros that fill up the adapter of a layer are left out, and so is the adapter of a
    layer that has nothing else. The classifier and the pooler are saved as a whole, the
    pooler with its adapter merged. The directory has its name when it is whole.

    Args:
        directory: Created if absent; must be empty if not.
        params: Parameters with adapters. Of the rest, the classifier and the pooler
            alone are saved.
        config: The model.
        base_model: Name or path of the model that the adapters belong to.
        scale: See :func:`experiments.model.adapters.merged`.
        replace: Whether the directory may hold something, which is deleted.

    Raises:
        UserError: If no layer has an adapter; if the directory is a file, or holds
            anything that is not to be replaced.
    """
    tensors, ranks = {}, {}
    adapters, names = dict(params["adapters"]), _tensor_names(config)
    for path, of_layers in names.items():
        if path[0] in WHOLE or ".".join(path) not in adapters:
            continue
        factors = adapters.pop(".".join(path))
        for name, *pair in zip(of_layers, factors["down"], factors["up"], strict=True):
            down, up = map(np.asarray, pair)
            in_use = np.flatnonzero(down.any(axis=0) | up.any(axis=1))
            if in_use.size:
                rank = ranks[_module(name)] = int(in_use[-1]) + 1
                one, other = _factor_names(name)
                tensors[one], tensors[other] = down[:, :rank].T, up[:rank].T
    if not ranks:
        raise UserError(f"{directory}: no block matrix has an adapter; train first")
    more: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": None}
    if isinstance(config, EncoderConfig):
        modules = _MODULES_TO_SAVE[config.kind]
        more = {"task_type": "SEQ_CLS", "modules_to_save": modules}
    model = {name: params["model"][name] for name in WHOLE if name in params["model"]}
    whole = merged({"model": model, "adapters": adapters}, scale)
    for path, leaf in traverse_util.flatten_dict(whole).items():
        tensors[names[path][0]] = flipped(path, np.asarray(leaf))
    with whole_directory(Path(directory), replace) as unfinished:
        write_peft_config(
            unfinished / _CONFIG,
            ranks,
            scale,
            modules=map(_module, itertools.chain(*names.values())),
            base_model_name_or_path=base_model,
            **more,
        )
        named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        write_tensors(unfinished / _WEIGHTS, named)


def load_peft_adapter(
    directory: str | Path, params: Any, config: Config
) -> tuple[Any, float]:
    """Reads adapters that :func:`save_peft_adapter`, or peft, wrote.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``;
            float32, float16 or bfloat16.
        params: Parameters of the model that the adapters belong to.
        config: The model.

    Returns:
        Parameters with adapters, and their scale, see
        :func:`experiments.model.adapters.merged`. Adapters are float32. In a stack, a
        smaller rank is filled up with zeros; a layer without an adapter has zeros. What
        the directory has as a whole, such as a classifier, is in its place.

    Raises:
        UserError: If a file is missing or unreadable; if it asks for what ``merged``
            does not compute; if a tensor is missing, unexpected, or of another shape or
            dtype.
    """
    weights = Path(directory) / _WEIGHTS
    settings = read_peft_config(Path(directory) / _CONFIG)
    tensors = {k.removeprefix(_PREFIX): v for k, v in open_file(weights).items()}
    names = _tensor_names(config)
    leaves: dict[TreePath, Any] = traverse_util.flatten_dict(params)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, of_layers in names.items():
        if not is_stacked(path) and of_layers[0] in tensors:
            shapes[of_layers[0]] = flipped(path, leaves[path]).shape
    adapted = {}
    for path in (tuple(name.split(".")) for name in block_matrices(params)):
        *_, n, m = leaves[path].shape
        found = [x for x in names[path] if tensors.keys() & {*_factor_names(x)}]
        for name in found:
            rank, (one, other) = settings.rank_of(_module(name)), _factor_names(name)
            shapes |= {one: (rank, n), other: (m, rank)}
        if found:
            adapted[path] = found
    check_tensors(
        weights,
        tensors,
        shapes,
        says=f"{_CONFIG} and the model say",
        mend="give LoRA of attention, MLP or pooler, made for this model",
    )
    adapters = {
        ".".join(path): _stack(names[path], leaves[path].shape, tensors, settings)
        for path in adapted
    }
    for path, of_layers in names.items():
        if of_layers[0] in shapes:
            leaf = flipped(path, tensors[of_layers[0]].read())
            leaves[path] = jnp.asarray(leaf, leaves[path].dtype)
    model = traverse_util.unflatten_dict(leaves)
    return {"model": model, "adapters": adapters}, settings.scale


def rank_of_adapter(directory: str | Path) -> int:
    """Returns the largest rank that the settings of an adapter name.

    Args:
        directory: See :func:`load_peft_adapter`.

    Raises:
        UserError: If the settings are missing, unreadable or not supported.
    """
    settings = read_peft_config(Path(directory) / _CONFIG)
    return max([settings.rank, *settings.rank_pattern.values()])


def _stack(
    names: list[str],
    shape: tuple[int, ...],
    tensors: dict[str, StoredTensor],
    settings: PeftConfig,
) -> dict[str, jnp.ndarray]:
    """Returns the factors of a leaf, whose layers have these names and this shape."""
    *stack, n, m = shape
    ranks = [settings.rank_of(_module(name)) for name in names]
    downs = np.zeros((len(names), n, max(ranks)), np.float32)
    ups = np.zeros((len(names), max(ranks), m), np.float32)
    for layer, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        one, other = (tensors.get(x) for x in _factor_names(name))
        if one is not None and other is not None:
            own = settings.scale_of(_module(name)) / settings.scale
            downs[layer, :, :rank] = one.read().T
            ups[layer, :rank] = own * other.read().T.astype(np.float32)
    return {
        "down": jnp.asarray(downs.reshape(*stack, n, -1)),
        "up": jnp.asarray(ups.reshape(*stack, -1, m)),
    }


def _tensor_names(config: Config) -> dict[TreePath, list[str]]:
    if isinstance(config, EncoderConfig):
        return encoder_files.tensor_names(config)
    return hugging_face.tensor_names(config)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _factor_names(name: str) -> tuple[str, str]:
    """Returns the names of down and up beside the weight of a module."""
    return f"{_module(name)}.lora_A.weight", f"{_module(name)}.lora_B.weight"
