"""Hugging Face's ``config.json`` of a LLaMA."""

import json
from pathlib import Path
from typing import Any, Protocol

from experiments.errors import UserError
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
    "max_positions": ("max_position_embeddings", int, 2048),
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


class SavedTokenizer(Protocol):
    """What weights carry of a tokenizer, see :mod:`experiments.data.tokenizers`."""

    beginning: int
    ends: tuple[int, ...]

    def save(self, directory: Path) -> None:
        """Writes its files."""
        ...


def read_config(path: Path) -> LlamaConfig:
    """Reads a model's shape.

    Raises:
        UserError: If the file is missing, is not JSON, lacks a number or has one of
            another type, or asks for what the model does not compute.
    """
    raw = read_json(path)
    # Since its version 5, transformers nests what concerns the positions.
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is no object; download it again")
    rope = {"rope_type": "default", **rope}
    if raw.get("rope_scaling") in ({"rope_type": "default"}, {"type": "default"}):
        raw = {**raw, "rope_scaling": None}
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
    if raw.get("num_key_value_heads") is None:
        raw = {**raw, "num_key_value_heads": raw.get("num_attention_heads")}
    fields = {
        field: read_field(path, raw, name, kind, default)
        for field, (name, kind, default) in _FIELDS.items()
    }
    config = LlamaConfig(**fields)
    if raw.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{path}: head_dim {raw['head_dim']} is not supported; it must be "
            f"hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def write_config(
    path: Path, config: LlamaConfig, tokenizer: SavedTokenizer | None
) -> None:
    """Writes a model's shape, and the ids of its tokenizer's special tokens."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        **{name: value for name, value in _FIXED.items() if value is not None},
        **{name: getattr(config, field) for field, (name, *_) in _FIELDS.items()},
        "bos_token_id": tokenizer and tokenizer.beginning,
        "eos_token_id": tokenizer and tokenizer.ends[0],
        "torch_dtype": config.param_dtype,
    }
    path.write_text(json.dumps(raw, indent=2) + "\n")


def read_field(
    path: Path, raw: dict[str, Any], name: str, kind: type, default: Any = None
) -> Any:
    """Returns a value of a ``config.json``, or the default where it is absent or null.

    Raises:
        UserError: If there is neither, or the value has another type.
    """
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


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a file holds.

    Raises:
        UserError: If it cannot be read, or holds something else.
    """
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
