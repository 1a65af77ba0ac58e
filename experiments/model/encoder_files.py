"""Weights of BERT and RoBERTa in Hugging Face's layout.

A Hugging Face kernel is (out, in) and one tensor per layer; ours is (in, out) and one
stack per kind of kernel.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util

from experiments.errors import UserError
from experiments.model.encoder import Params, init_encoder
from experiments.model.encoder_config_file import (
    read_encoder_config,
    write_encoder_config,
)
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.safetensors_files import (
    StoredTensor,
    check_tensors,
    open_tensors,
    param_dtype,
    whole_directory,
    write_tensors,
)
from experiments.model.tensor_layout import (
    Names,
    TreePath,
    by_layer,
    read_leaf,
    stored_shapes,
    stored_tensors,
)

# Path of a module in our tree: its name in the file; {} is the layer.
_MODULES: dict[TreePath, str] = {
    ("embeddings", "norm"): "embeddings.LayerNorm",
    ("blocks", "attention", "query"): "encoder.layer.{}.attention.self.query",
    ("blocks", "attention", "key"): "encoder.layer.{}.attention.self.key",
    ("blocks", "attention", "value"): "encoder.layer.{}.attention.self.value",
    ("blocks", "attention", "output"): "encoder.layer.{}.attention.output.dense",
    ("blocks", "attention_norm"): "encoder.layer.{}.attention.output.LayerNorm",
    ("blocks", "mlp", "up"): "encoder.layer.{}.intermediate.dense",
    ("blocks", "mlp", "down"): "encoder.layer.{}.output.dense",
    ("blocks", "mlp_norm"): "encoder.layer.{}.output.LayerNorm",
}
_HEADS: dict[str, dict[TreePath, str]] = {
    "bert": {("pooler",): "pooler.dense", ("classifier",): "classifier"},
    "roberta": {
        ("pooler",): "classifier.dense",
        ("classifier",): "classifier.out_proj",
    },
}
_TABLES: dict[TreePath, str] = {
    ("embeddings", "word"): "embeddings.word_embeddings.weight",
    ("embeddings", "position"): "embeddings.position_embeddings.weight",
    ("embeddings", "segment"): "embeddings.token_type_embeddings.weight",
}

# What names of buffers, and of heads of other tasks, begin with.
_OTHERS = (
    *("embeddings.position_ids", "embeddings.token_type_ids"),
    *("cls.", "lm_head.", "qa_outputs."),
)
_OTHER_HEADS = {
    "bert": (),
    "roberta": ("pooler.", "classifier.weight", "classifier.bias"),
}

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)


def load_encoder(
    directory: str | Path, num_labels: int | None, key: jax.Array
) -> tuple[EncoderConfig, Params]:
    """Reads an encoder from a directory in Hugging Face's layout.

    Of a sequence classifier, the head is read if it has ``num_labels`` outputs. A head
    that is not there is drawn as :func:`experiments.model.encoder.init_encoder` does,
    and so is a pooler. Heads of other tasks are left out.

    Args:
        directory: Holds ``config.json`` and ``model.safetensors``, or the shards that
            ``model.safetensors.index.json`` lists; float32, float16 or bfloat16.
        num_labels: Outputs of the head, >= 1; 1 is regression. None: as many as
            ``config.json`` has labels.
        key: Key for the draws of what is not there.

    Returns:
        The configuration and the parameters. They stay bfloat16 if every tensor is
        bfloat16; otherwise all are widened, exactly, to float32.

    Raises:
        UserError: If a file is missing or unreadable, the configuration asks for what
            the model does not compute, or a tensor is missing, unexpected, or of
            another shape or dtype.
    """
    config, tensors = _opened(Path(directory), num_labels)
    dtype = jnp.dtype(config.param_dtype)
    leaves, absent = {}, []
    for path, names in _names(config).items():
        if names[0] not in tensors:
            absent.append(path)
            continue
        leaves[path] = read_leaf(path, names, lambda x: tensors[x].read(), dtype)

    # The compiler leaves out the draws of what is there.
    @jax.jit
    def fresh(key):
        drawn = traverse_util.flatten_dict(init_encoder(config, key))
        return [drawn[path] for path in absent]

    leaves |= zip(absent, fresh(key) if absent else (), strict=True)
    return config, traverse_util.unflatten_dict(leaves)


def read_encoder_shape(
    directory: str | Path, num_labels: int | None = None
) -> EncoderConfig:
    """Returns the configuration that :func:`load_encoder` does, without the weights.

    Raises:
        UserError: As there.
    """
    return _opened(Path(directory), num_labels)[0]


def save_encoder(
    directory: str | Path,
    config: EncoderConfig,
    params: Params,
    tokenizer_source: str | Path | None = None,
    label_names: Sequence[str] | None = None,
    replace: bool = False,
) -> None:
    """Writes a sequence classifier as a directory in Hugging Face's layout.

    ``config.json`` and ``model.safetensors``, whose tensors keep their bits and dtype.
    Everybody may read the files whom the umask lets. The directory has its name when it
    is whole; before, it is called ``.unfinished`` behind that.

    Args:
        directory: Created if absent; must be empty if not.
        config: The model.
        params: The tree of :func:`experiments.model.encoder.init_encoder`.
        tokenizer_source: A directory, from which the files of a tokenizer are copied.
            None: no tokenizer is written.
        label_names: A name for each output of the head, all different. None: LABEL_0
            and so on.
        replace: Whether the directory may hold something, which is deleted.

    Raises:
        UserError: If the directory is a file, or holds anything that is not to be
            replaced; if the names are not as many as the outputs, or not different.
    """
    names = label_names or [f"LABEL_{i}" for i in range(config.num_labels)]
    if len(set(names)) != config.num_labels or len(names) != config.num_labels:
        raise UserError(
            f"label_names are {', '.join(names)}; the model has {config.num_labels} "
            "labels, give each a name of its own"
        )
    with whole_directory(Path(directory), replace) as unfinished:
        write_encoder_config(unfinished / "config.json", config, names)
        tensors = stored_tensors(params, tensor_names(config))
        write_tensors(unfinished / "model.safetensors", tensors)
        if tokenizer_source is not None:
            _copy_tokenizer(Path(tokenizer_source), unfinished)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def tensor_names(config: EncoderConfig) -> Names:
    """Returns the names in a sequence classifier of the tensors of each path."""

    def own(name):
        return name if name.startswith("classifier.") else f"{config.kind}.{name}"

    return {path: list(map(own, names)) for path, names in _names(config).items()}


def _opened(directory: Path, num_labels: int | None):
    """Returns the configuration, and the tensors by their names without a prefix.

    A module of the head is not among the tensors if it is to be drawn.
    """
    config = read_encoder_config(directory / "config.json", num_labels)
    tensors = _renamed(config, open_tensors(directory))
    shapes = _shapes(config)
    for path, module in _HEADS[config.kind].items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        found = tensors.get(weight)
        if (
            path == ("classifier",)
            and found is not None
            and found.shape[:1] != (config.num_labels,)
        ):
            # A head for other labels.
            tensors = {k: v for k, v in tensors.items() if k not in (weight, bias)}
        if weight not in tensors:
            del shapes[weight], shapes[bias]
    check_tensors(directory, tensors, shapes)
    return dataclasses.replace(config, param_dtype=param_dtype(tensors)), tensors


def _renamed(
    config: EncoderConfig, found: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Returns the encoder's tensors and its head's, by the names that we give them."""
    others = _OTHERS + _OTHER_HEADS[config.kind]
    tensors = {}
    for name, tensor in found.items():
        own = name.removeprefix(f"{config.kind}.")
        # What TensorFlow called weight and bias.
        own = own.replace("LayerNorm.gamma", "LayerNorm.weight")
        own = own.replace("LayerNorm.beta", "LayerNorm.bias")
        if not own.startswith(others):
            tensors[own] = tensor
    return tensors


def _names(config: EncoderConfig) -> Names:
    """Returns the names of the tensors of each path of our tree, a name per layer."""
    names = dict(_TABLES)
    for path, module in (_MODULES | _HEADS[config.kind]).items():
        weight = "scale" if path[-1].endswith("norm") else "kernel"
        names[*path, weight] = f"{module}.weight"
        names[*path, "bias"] = f"{module}.bias"
    return by_layer(names, config.num_layers)


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape in the file of each tensor, by name."""
    tree = jax.eval_shape(lambda: init_encoder(config, jax.random.key(0)))
    return stored_shapes(tree, _names(config))
