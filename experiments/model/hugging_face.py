"""LLaMA weights in Hugging Face's layout: ``config.json`` and ``*.safetensors``.

A Hugging Face kernel is (out, in) and one tensor per layer; ours is (in, out) and one
stack per kind of kernel. Both rotate the pairs (i, i + h / 2) of a head, so query and
key need no permutation.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from experiments.errors import UserError
from experiments.model.config_file import (
    SavedTokenizer,
    read_config,
    read_json,
    write_config,
)
from experiments.model.llama import Params, init_params
from experiments.model.shape import LlamaConfig

# Path in our tree: name of the tensor; {} is the layer.
_TENSORS: dict[tuple[str, ...], str] = {
    ("embedding",): "model.embed_tokens.weight",
    ("norm",): "model.norm.weight",
    ("head",): "lm_head.weight",
} | {
    ("blocks", *path): f"model.layers.{{}}.{name}.weight"
    for path, name in {
        ("attention_norm",): "input_layernorm",
        ("attention", "query"): "self_attn.q_proj",
        ("attention", "key"): "self_attn.k_proj",
        ("attention", "value"): "self_attn.v_proj",
        ("attention", "output"): "self_attn.o_proj",
        ("mlp_norm",): "post_attention_layernorm",
        ("mlp", "gate"): "mlp.gate_proj",
        ("mlp", "up"): "mlp.up_proj",
        ("mlp", "down"): "mlp.down_proj",
    }.items()
}

_DTYPES = ("F32", "F16", "BF16")


def load_llama(directory: str | Path) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA from a directory in Hugging Face's layout.

    Args:
        directory: Holds ``config.json`` and ``model.safetensors``, or the shards that
            ``model.safetensors.index.json`` lists; float32, float16 or bfloat16.

    Returns:
        The configuration and the parameters. They stay bfloat16 if every tensor is
        bfloat16; otherwise all are widened, exactly, to float32.

    Raises:
        UserError: If a file is missing or unreadable, the configuration asks for what
            the model does not compute, or a tensor is missing, unexpected, or of
            another shape or dtype.
    """
    config, tensors = _opened(Path(directory))

    def read(path, name):
        tensor = _flip(path, tensors[name].get_tensor(name))
        return tensor.astype(jnp.dtype(config.param_dtype))

    params = {}
    for path, names in _names(config).items():
        leaf = [read(path, name) for name in names]
        params[path] = jnp.asarray(np.stack(leaf) if _is_stacked(path) else leaf[0])
    return config, traverse_util.unflatten_dict(params)


def read_shape(directory: str | Path) -> LlamaConfig:
    """Returns the configuration that :func:`load_llama` does, without the weights.

    Raises:
        UserError: As there.
    """
    return _opened(Path(directory))[0]


def save_llama(
    directory: str | Path,
    config: LlamaConfig,
    params: Params,
    tokenizer: SavedTokenizer | None = None,
    replace: bool = False,
) -> None:
    """Writes a model, and its tokenizer, as a directory in Hugging Face's layout.

    ``config.json`` and ``model.safetensors``, whose tensors keep their bits and dtype;
    of the tokenizer, its file and ``tokenizer_config.json``. Everybody may read the
    files whom the umask lets. The directory has its name when it is whole; before, it
    is called ``.unfinished`` behind that.

    Args:
        directory: Created if absent; must be empty if not.
        config: The model.
        params: The tree of :func:`experiments.model.llama.init_params`.
        tokenizer: What the model was trained with. None: no tokenizer is written, and
            the ids of the special tokens are null.
        replace: Whether the directory may hold something, which is deleted.

    Raises:
        UserError: If the directory is a file, or holds anything that is not to be
            replaced.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a directory to save the model in")
    if directory.exists() and not replace and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; save the model in a new directory")
    place = directory.absolute()
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_config(unfinished / "config.json", config, tokenizer)
    _write_tensors(unfinished / "model.safetensors", config, params)
    # safetensors makes a file that its owner alone may read.
    shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save(unfinished)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


def _write_tensors(path, config, params):
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for place, names in _names(config).items():
        leaf = np.asarray(leaves[place])
        matrices = leaf if _is_stacked(place) else [leaf]
        for name, matrix in zip(names, matrices, strict=True):
            # safetensors writes the buffer as it lies in memory, strides ignored.
            tensors[name] = np.ascontiguousarray(_flip(place, matrix))
    # Hugging Face's loader refuses a file that does not name a format.
    save_file(tensors, path, metadata={"format": "pt"})


def _opened(directory):
    """Returns the configuration and, for each tensor's name, its open file."""
    config = read_config(directory / "config.json")
    tensors = _open_tensors(directory)
    _check_tensors(directory, config, tensors)
    dtypes = {tensors[name].get_slice(name).get_dtype() for name in tensors}
    param_dtype = "bfloat16" if dtypes == {"BF16"} else "float32"
    return dataclasses.replace(config, param_dtype=param_dtype), tensors


def _open_tensors(directory):
    """Returns, for each tensor's name, the open file that holds it."""
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists() and not (directory / "model.safetensors").exists():
        files = set(read_json(index).get("weight_map", {}).values())
    tensors = {}
    for file in sorted(files):
        path = directory / file
        if not path.is_file():
            raise UserError(f"{path} is missing; put it beside config.json")
        try:
            handle = safetensors.safe_open(path, framework="np")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a safetensors file ({error}); download it again"
            ) from error
        tensors |= dict.fromkeys(handle.keys(), handle)
    # Old exports store the rotary frequencies, which follow from rope_theta.
    return {k: v for k, v in tensors.items() if not k.endswith(".rotary_emb.inv_freq")}


def _check_tensors(directory, config, tensors):
    shapes = _shapes(config)
    for problem, names in (
        ("is missing", shapes.keys() - tensors.keys()),
        ("is not expected", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise UserError(
                f"{directory}: tensor {min(names)} {problem} ({len(names)} in all); "
                "give weights that belong to the config.json beside them"
            )
    for name, shape in shapes.items():
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise UserError(
                f"{directory}: tensor {name} has shape {tuple(found.get_shape())}, "
                f"config.json says {shape}; give weights that belong to it"
            )
        if found.get_dtype() not in _DTYPES:
            raise UserError(
                f"{directory}: tensor {name} has dtype {found.get_dtype()}; "
                f"convert it to one of {', '.join(_DTYPES)}"
            )


def _names(config):
    """Returns the names of the tensors of each path of our tree, a name per layer."""
    return {
        path: [name.format(i) for i in range(config.num_layers)]
        if _is_stacked(path)
        else [name]
        for path, name in _TENSORS.items()
        if not (config.tie_embeddings and path == ("head",))
    }


def _shapes(config):
    """Returns the shape in the file of each tensor, by name."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(tree)
    shapes = {}
    for path, names in _names(config).items():
        shape = leaves[path].shape[1:] if _is_stacked(path) else leaves[path].shape
        # Like _flip, for a shape: kernels are (out, in) in the file.
        shapes |= dict.fromkeys(names, shape if path == ("embedding",) else shape[::-1])
    return shapes


def _is_stacked(path):
    return path[0] == "blocks"


def _flip(path, tensor):
    """Turns (out, in) into (in, out) or back; vectors and the embedding stay."""
    return tensor if path == ("embedding",) else tensor.T
