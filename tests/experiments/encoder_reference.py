"""Small encoders with the weights of the stored logits, as files and as trees."""

import json

import jax
from safetensors.numpy import save_file

from experiments.model.encoder_files import load_encoder
from tests.experiments.references.encoder_logits import (
    BERT,
    ROBERTA,
    STORED,
    batch_of,
    tensors_of,
)

CONFIGS = {"bert": BERT, "roberta": ROBERTA}


def stored(kind):
    return json.loads(STORED.read_text())[kind]


def write_encoder(directory, config, tensors=None):
    """Writes a directory as Hugging Face lays it out; returns it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(config) if tensors is None else tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def small_encoder(kind, directory):
    """Returns configuration, parameters and a batch; the logits are stored."""
    path = write_encoder(directory / kind, CONFIGS[kind])
    config, params = load_encoder(path, 3, jax.random.key(0))
    return config, params, batch_of(CONFIGS[kind])
