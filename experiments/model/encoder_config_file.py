"""Hugging Face's ``config.json`` of a BERT or RoBERTa."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.model.config_file import read_field, read_json
from experiments.model.encoder_shape import EncoderConfig

# EncoderConfig field: its name in config.json, type, and Hugging Face's default if any.
_FIELDS: dict[str, tuple[str, type, Any]] = {
    "vocab_size": ("vocab_size", int, None),
    "hidden_size": ("hidden_size", int, None),
    "intermediate_size": ("intermediate_size", int, None),
    "num_layers": ("num_hidden_layers", int, None),
    "num_heads": ("num_attention_heads", int, None),
    "type_vocab_size": ("type_vocab_size", int, 2),
    "layer_norm_eps": ("layer_norm_eps", float, 1e-12),
    "hidden_dropout": ("hidden_dropout_prob", float, 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", float, 0.1),
}

# What the model computes, as config.json says it; any other value is refused.
_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}

_PADDING = {"bert": 0, "roberta": 1}
_CLASSES = {"bert": "Bert", "roberta": "Roberta"}


def read_encoder_config(path: Path, num_labels: int | None = None) -> EncoderConfig:
    """Reads an encoder's shape.

    Args:
        path: The file.
        num_labels: Outputs of the head, >= 1. None: as many as the file says, or two.

    Raises:
        UserError: If the file is missing, is not JSON, lacks a number or has one of
            another type, or asks for what the model does not compute.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in _CLASSES:
        raise UserError(
            f"{path}: model_type {kind!r} is not supported; give an encoder of type "
            f"{' or '.join(_CLASSES)}"
        )
    for name, value in _FIXED.items():
        if name in raw and raw[name] != value:
            raise UserError(
                f"{path}: {name} {raw[name]!r} is not supported; give a plain "
                f"{_CLASSES[kind]} encoder (exact gelu, absolute positions, "
                "no quantization)"
            )
    fields = {
        field: read_field(path, raw, name, type_, default)
        for field, (name, type_, default) in _FIELDS.items()
    }
    padding = read_field(path, raw, "pad_token_id", int, _PADDING[kind])
    positions = read_field(path, raw, "max_position_embeddings", int)
    dropout = fields["hidden_dropout"]
    if num_labels is None:
        num_labels = len(read_field(path, raw, "id2label", dict, {0: "", 1: ""}))
    return EncoderConfig(
        kind=kind,
        **fields,
        padding_id=padding,
        # RoBERTa's table begins with the rows of padding.
        max_positions=positions - (padding + 1 if kind == "roberta" else 0),
        classifier_dropout=read_field(path, raw, "classifier_dropout", float, dropout),
        num_labels=num_labels,
    )


def write_encoder_config(
    path: Path, config: EncoderConfig, label_names: Sequence[str]
) -> None:
    """Writes an encoder's shape, and the names of its labels."""
    one = config.num_labels == 1
    raw = {
        "architectures": [f"{_CLASSES[config.kind]}ForSequenceClassification"],
        "model_type": config.kind,
        **{name: value for name, value in _FIXED.items() if value is not None},
        **{name: getattr(config, field) for field, (name, *_) in _FIELDS.items()},
        "pad_token_id": config.padding_id,
        "max_position_embeddings": config.position_rows,
        "classifier_dropout": config.classifier_dropout,
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "regression" if one else "single_label_classification",
        "torch_dtype": config.param_dtype,
    }
    path.write_text(json.dumps(raw, indent=2) + "\n")
