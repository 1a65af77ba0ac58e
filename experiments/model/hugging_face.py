"""LLaMA weights in Hugging Face's layout: ``config.json`` and ``*.safetensors``.

Both rotate the pairs (i, i + h / 2) of a head, so query and key need no permutation.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.data.gguf_reader import is_gguf
from experiments.errors import UserError
from experiments.model.config_file import SavedTokenizer, read_config, write_config
from experiments.model.gguf_files import load_gguf, read_gguf_shape
from experiments.model.llama import Params
from experiments.model.safetensors_files import (
    StoredTensor,
    check_tensors,
    open_tensors,
    param_dtype,
    whole_directory,
    write_tensors,
)
from experiments.model.shape import LlamaConfig
from experiments.model.tensor_layout import (
    Names,
    names_of,
    read_leaf,
    shapes_of,
    stored_tensors,
)

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


def load_llama(directory: str | Path) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA from a directory in Hugging Face's layout, or from a GGUF file.

    Args:
        directory: Holds ``config.json`` and ``model.safetensors``, or the shards that
            ``model.safetensors.index.json`` lists; float32, float16 or bfloat16. Or a
            ``.gguf`` file, see :func:`experiments.model.gguf_files.load_gguf`.

    Returns:
        The configuration and the parameters. They stay bfloat16 if every tensor of a
        directory is bfloat16; otherwise all are widened, exactly, to float32.

    Raises:
        UserError: If a file is missing or unreadable, the configuration asks for what
            the model does not compute, or a tensor is missing, unexpected, or of
            another shape or dtype.
    """
    if is_gguf(directory):
        return load_gguf(directory)
    config, tensors = _opened(Path(directory))

    dtype = jnp.dtype(config.param_dtype)
    params = {
        path: read_leaf(path, names, lambda name: tensors[name].read(), dtype)
        for path, names in tensor_names(config).items()
    }
    return config, traverse_util.unflatten_dict(params)


def read_shape(directory: str | Path) -> LlamaConfig:
    """Returns the configuration that :func:`load_llama` does, without the weights.

    Raises:
        UserError: As there.
    """
    if is_gguf(directory):
        return read_gguf_shape(directory)
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
    with whole_directory(Path(directory), replace) as unfinished:
        write_config(unfinished / "config.json", config, tokenizer)
        tensors = stored_tensors(params, tensor_names(config))
        write_tensors(unfinished / "model.safetensors", tensors)
        if tokenizer is not None:
            tokenizer.save(unfinished)


def tensor_names(config: LlamaConfig) -> Names:
    """Returns the names of the tensors of each path of our tree, a name per layer."""
    return names_of(config, _TENSORS)


def _opened(directory):
    """Returns the configuration, and the tensors by name."""
    config = read_config(directory / "config.json")
    tensors = {
        name: tensor
        for name, tensor in open_tensors(directory).items()
        # Old exports store the rotary frequencies, which follow from rope_theta.
        if not name.endswith(".rotary_emb.inv_freq")
    }
    if config.tie_embeddings:
        _drop_tied_head(directory, tensors)
    check_tensors(directory, tensors, shapes_of(config, _TENSORS))
    return dataclasses.replace(config, param_dtype=param_dtype(tensors)), tensors


def _drop_tied_head(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """Drops the head of a tied model: some converters write the embedding twice."""
    names = _TENSORS["head",], _TENSORS["embedding",]
    if not all(name in tensors for name in names):
        return
    head, embedding = (tensors[name].read() for name in names)
    if not np.array_equal(head, embedding):
        raise UserError(
            f"{directory}: {names[0]} is not {names[1]}, but config.json says that "
            "they are tied; set its tie_word_embeddings to false"
        )
    del tensors[names[0]]
