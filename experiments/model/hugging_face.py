"""LLaMA weights in Hugging Face's layout: ``config.json`` and ``*.safetensors``.

A Hugging Face kernel is (out, in) and one tensor per layer; ours is (in, out) and one
stack per kind of kernel. Both rotate the pairs (i, i + h / 2) of a head, so query and
key need no permutation.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from experiments.errors import UserError
from experiments.model.llama import Params, init_params
from experiments.model.shape import LlamaConfig

# LlamaConfig field: its name in config.json, type, and Hugging Face's default if any.
_FIELDS: dict[str, tuple[str, type, Any]] = {
    "vocab_size": ("vocab_size", int, None),
    "hidden_size": ("hidden_size", int, None),
    "intermediate_size": ("intermediate_size", int, None),
    "num_layers": ("num_hidden_layers", int, None),
    "num_heads": ("num_attention_heads", int, None),
    "num_kv_heads": ("num_key_value_heads", int, None),
    "rms_norm_eps": ("rms_norm_eps", float, 1e-6),
    "rope_theta": ("rope_theta", float, 10000.0),
    "tie_embeddings": ("tie_word_embeddings", bool, False),
}

# What the model computes, as config.json says it; any other value is refused.
_FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_scaling": None,
    "quantization_config": None,
}

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
    directory = Path(directory)
    config = _read_config(directory / "config.json")
    tensors = _open_tensors(directory)
    _check_tensors(directory, config, tensors)
    dtypes = {tensors[name].get_slice(name).get_dtype() for name in tensors}
    param_dtype = "bfloat16" if dtypes == {"BF16"} else "float32"

    def read(path, name):
        tensor = _flip(path, tensors[name].get_tensor(name))
        return tensor.astype(jnp.dtype(param_dtype))

    params = {}
    for path, names in _names(config).items():
        leaf = [read(path, name) for name in names]
        params[path] = jnp.asarray(np.stack(leaf) if _is_stacked(path) else leaf[0])
    config = dataclasses.replace(config, param_dtype=param_dtype)
    return config, traverse_util.unflatten_dict(params)


def save_llama(directory: str | Path, config: LlamaConfig, params: Params) -> None:
    """Writes ``config.json`` and ``model.safetensors`` in Hugging Face's layout.

    The tensors keep their bits and dtype. The files say nothing of the tokenizer: the
    special tokens' ids in ``config.json`` are null.

    Args:
        directory: Created if absent; must be empty if not.
        config: The model.
        params: The tree of :func:`experiments.model.llama.init_params`.

    Raises:
        UserError: If the directory holds anything, or is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a directory to save the model in")
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; save the model in a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for path, names in _names(config).items():
        leaf = np.asarray(leaves[path])
        matrices = leaf if _is_stacked(path) else [leaf]
        for name, matrix in zip(names, matrices, strict=True):
            # safetensors writes the buffer as it lies in memory, strides ignored.
            tensors[name] = np.ascontiguousarray(_flip(path, matrix))
    # Hugging Face's loader refuses a file that does not name a format.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = {
        "architectures": ["LlamaForCausalLM"],
        **{name: value for name, value in _FIXED.items() if value is not None},
        **{name: getattr(config, field) for field, (name, *_) in _FIELDS.items()},
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": config.param_dtype,
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _read_config(path):
    raw = _read_json(path)
    # Since its version 5, transformers nests what concerns the positions.
    rope = {"rope_type": "default", **(raw.get("rope_parameters") or {})}
    raw = {**raw, **{k: v for k, v in rope.items() if k == "rope_theta"}}
    odd = {k: raw[k] for k, v in _FIXED.items() if k in raw and raw[k] != v}
    odd |= {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    if rope["rope_type"] != "default":
        odd["rope_type"] = rope["rope_type"]
    for name, value in odd.items():
        raise UserError(
            f"{path}: {name} {value!r} is not supported; give a plain LLaMA "
            "(silu, no biases, no dropout, no quantization, unscaled rotary positions)"
        )
    fields = {
        field: _field(path, raw, name, kind, default)
        for field, (name, kind, default) in _FIELDS.items()
    }
    config = LlamaConfig(**fields)
    if raw.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{path}: head_dim {raw['head_dim']} is not supported; it must be "
            f"hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def _field(path, raw, name, kind, default) -> Any:
    if name == "num_key_value_heads":
        default = raw.get("num_attention_heads")
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise UserError(f"{path}: {name} is missing; add it")
    # 10000 is an int in JSON, and true is an int in Python.
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise UserError(
            f"{path}: {name} is {value!r}; give a value of type {kind.__name__}"
        )
    return kind(value)


def _read_json(path):
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); "
            "give a directory with config.json and model.safetensors"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return raw


def _open_tensors(directory):
    """Returns, for each tensor's name, the open file that holds it."""
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists() and not (directory / "model.safetensors").exists():
        files = set(_read_json(index).get("weight_map", {}).values())
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
