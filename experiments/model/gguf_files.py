"""LLaMA weights from a GGUF file, dequantized by the package ``gguf``."""

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from experiments.data.gguf_reader import GgufFile, open_gguf
from experiments.errors import UserError
from experiments.model.llama import Params
from experiments.model.shape import LlamaConfig
from experiments.model.tensor_layout import names_of, read_leaf, shapes_of

_TENSORS: dict[tuple[str, ...], str] = {
    ("embedding",): "token_embd.weight",
    ("norm",): "output_norm.weight",
    ("head",): "output.weight",
} | {
    ("blocks", *path): f"blk.{{}}.{name}.weight"
    for path, name in {
        ("attention_norm",): "attn_norm",
        ("attention", "query"): "attn_q",
        ("attention", "key"): "attn_k",
        ("attention", "value"): "attn_v",
        ("attention", "output"): "attn_output",
        ("mlp_norm",): "ffn_norm",
        ("mlp", "gate"): "ffn_gate",
        ("mlp", "up"): "ffn_up",
        ("mlp", "down"): "ffn_down",
    }.items()
}

# What the model computes, as the fields say it; any other value is refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "expert_count": (0,),
}


def load_gguf(path: str | Path) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA from a GGUF file.

    Args:
        path: A file of architecture "llama": of any quantization that ``gguf`` knows to
            undo, without experts, biases or scaled rotary positions. Without a tensor
            output.weight the embedding is the head too.

    Returns:
        The configuration, and the parameters in float32.

    Raises:
        UserError: If the file cannot be read, holds another architecture, or asks for
            what the model does not compute; or if a tensor is missing, unexpected, of
            another shape, or of an unknown quantization.
    """
    file = open_gguf(path)
    config = _checked_shape(file)
    heads = {"query": config.num_heads, "key": config.num_kv_heads}

    def read(place, name):
        tensor = _dequantized(file, name)
        if place[-1] in heads:
            tensor = _halves_of_heads(tensor, heads[place[-1]])
        return tensor

    params = {
        place: read_leaf(place, names, functools.partial(read, place))
        for place, names in names_of(config, _TENSORS).items()
    }
    return config, traverse_util.unflatten_dict(params)


def read_gguf_shape(path: str | Path) -> LlamaConfig:
    """Returns the configuration that :func:`load_gguf` does, without the weights.

    Raises:
        UserError: As there, but for the quantization.
    """
    return _checked_shape(open_gguf(path))


def _checked_shape(file: GgufFile) -> LlamaConfig:
    config = _shape(file)
    shapes = shapes_of(config, _TENSORS)
    for problem, names in (
        ("is missing", shapes.keys() - file.tensors.keys()),
        ("is not expected", file.tensors.keys() - shapes.keys()),
    ):
        if names:
            raise UserError(
                f"{file.path}: tensor {min(names)} {problem} ({len(names)} in all); "
                "give the file of a plain LLaMA"
            )
    for name, shape in shapes.items():
        # ggml names the fastest axis first.
        found = tuple(map(int, file.tensors[name].shape[::-1]))
        if found != shape:
            raise UserError(
                f"{file.path}: tensor {name} has shape {found}, the fields of the file "
                f"say {shape}; download it again"
            )
    return config


def _shape(file: GgufFile) -> LlamaConfig:
    """Returns what the fields say."""
    architecture = file.field("general.architecture", str)
    if architecture != "llama":
        raise UserError(
            f"{file.path}: the architecture {architecture!r} is not supported; "
            "give a file of architecture 'llama'"
        )
    for name, allowed in _FIXED.items():
        value = file.fields.get(f"llama.{name}", allowed[0])
        if value not in allowed:
            raise UserError(
                f"{file.path}: llama.{name} {value!r} is not supported; give a plain "
                "LLaMA (no experts, unscaled rotary positions)"
            )
    if "rope_freqs.weight" in file.tensors:
        raise UserError(
            f"{file.path}: tensor rope_freqs.weight scales rotary positions, which is "
            "not supported; give a LLaMA without it"
        )
    embedding = file.tensors.get("token_embd.weight")
    rows = int(embedding.shape[-1]) if embedding else None
    num_heads = file.field("llama.attention.head_count", int)
    config = LlamaConfig(
        vocab_size=file.field("llama.vocab_size", int, rows or 1),
        hidden_size=file.field("llama.embedding_length", int),
        intermediate_size=file.field("llama.feed_forward_length", int),
        num_layers=file.field("llama.block_count", int),
        num_heads=num_heads,
        num_kv_heads=file.field("llama.attention.head_count_kv", int, num_heads),
        rms_norm_eps=_decimal(
            file.field("llama.attention.layer_norm_rms_epsilon", float)
        ),
        rope_theta=file.field("llama.rope.freq_base", float, 10000.0),
        tie_embeddings="output.weight" not in file.tensors,
        max_positions=file.field("llama.context_length", int, 2048),
    )
    for name in (
        "rope.dimension_count",
        "attention.key_length",
        "attention.value_length",
    ):
        width = file.fields.get(f"llama.{name}", config.head_dim)
        if width != config.head_dim:
            raise UserError(
                f"{file.path}: llama.{name} {width} is not supported; it must be "
                f"embedding_length / head_count = {config.head_dim}"
            )
    return config


def _decimal(number: float) -> float:
    """Returns the shortest decimal number with this float32: 1e-5 for 9.99999975e-6."""
    return float(str(np.float32(number)))


def _dequantized(file: GgufFile, name: str) -> np.ndarray:
    """Returns a tensor, (out, in) or (n,), in float32."""
    quants = importlib.import_module("gguf.quants")
    tensor = file.tensors[name]
    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"{file.path}: tensor {name} has the quantization "
            f"{tensor.tensor_type.name}, which gguf cannot undo; give the model in "
            "another one, such as Q8_0"
        ) from error


def _halves_of_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Brings the rows of a query or key, (H h, d), from ggml's order into ours.

    ggml rotates the neighbours 2 i and 2 i + 1 of a head, we i and i + h / 2.
    """
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[-1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
