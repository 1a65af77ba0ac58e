"""Small GGUF files, laid out as llama.cpp's converter does."""

import gguf
import numpy as np

from experiments.model.shape import LlamaConfig
from tests.experiments import llama_reference

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=50.0,
    max_positions=77,
)
FIELDS = {
    "llama.vocab_size": 40,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50.0,
    "llama.rope.dimension_count": 8,
    "llama.context_length": 77,
}


def tensors_of(params) -> dict[str, np.ndarray]:
    """The tensors of a file, query and key in ggml's order."""
    params = {name: params[name] for name in params}
    blocks = params["blocks"]
    tensors = {
        "token_embd.weight": params["embedding"],
        "output_norm.weight": params["norm"],
    }
    if "head" in params:
        tensors["output.weight"] = params["head"].T
    for i in range(CONFIG.num_layers):
        attention, mlp = blocks["attention"], blocks["mlp"]
        tensors |= {
            f"blk.{i}.attn_norm.weight": blocks["attention_norm"][i],
            f"blk.{i}.attn_q.weight": neighbours(attention["query"][i].T, 4),
            f"blk.{i}.attn_k.weight": neighbours(attention["key"][i].T, 2),
            f"blk.{i}.attn_v.weight": attention["value"][i].T,
            f"blk.{i}.attn_output.weight": attention["output"][i].T,
            f"blk.{i}.ffn_norm.weight": blocks["mlp_norm"][i],
            f"blk.{i}.ffn_gate.weight": mlp["gate"][i].T,
            f"blk.{i}.ffn_up.weight": mlp["up"][i].T,
            f"blk.{i}.ffn_down.weight": mlp["down"][i].T,
        }
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}


def neighbours(rows, heads):
    """Row i + h / 2 of each head comes behind row i."""
    width = rows.shape[0] // heads
    order = [
        head * width + i + half
        for head in range(heads)
        for i in range(width // 2)
        for half in (0, width // 2)
    ]
    return np.asarray(rows)[order]


def write(path, tensors, *, quantization="F32", architecture="llama", **fields):
    """Writes a file; matrices are quantized. A field of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {int: "uint32", float: "float32", str: "string", bool: "bool"}
    for name, value in (FIELDS | fields).items():
        if value is None:
            continue
        kind = kinds.get(type(value), "array")
        getattr(writer, f"add_{kind}")(name, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[quantization]
        if tensor.ndim == 1 or tensor.dtype != np.float32 or quantization == "F32":
            writer.add_tensor(name, tensor)
        else:
            packed = gguf.quants.quantize(tensor, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(config=CONFIG):
    return tensors_of(llama_reference.random_params(config))
