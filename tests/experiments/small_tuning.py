"""An encoder and examples so small that a whole fine-tuning run takes seconds."""

import dataclasses
import random
from pathlib import Path

import jax

from experiments.finetune import main
from experiments.model.encoder import init_encoder
from experiments.model.encoder_files import save_encoder
from experiments.model.encoder_shape import EncoderConfig
from tests.experiments.small_tasks import write_rows, write_tokenizer

MODEL = EncoderConfig(
    kind="bert",
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    max_positions=32,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    padding_id=0,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    classifier_dropout=0.1,
    num_labels=2,
)


def write_inputs(directory: Path) -> list[str]:
    """Writes an encoder and examples; returns the flags of a run of both.

    An example is "yes" if its first letter is a or b.
    """
    model = directory / "model"
    # Its head has another number of labels, and is drawn anew.
    config = dataclasses.replace(MODEL, num_labels=3)
    params = init_encoder(config, jax.random.key(1))
    # As large as trained weights, so that letters make a difference.
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)
    save_encoder(model, config, params)
    write_tokenizer(model)
    draw = random.Random(0)

    def row():
        letters = draw.choices("abyz", k=draw.choice((3, 5, 21)))
        label = "yes" if letters[0] < "n" else "no"
        return {"text": " ".join(letters), "label": label}

    flags = {
        "--model": model,
        "--train": write_rows(directory / "train.jsonl", [row() for _ in range(44)]),
        "--validation": write_rows(
            directory / "validation.jsonl", [row() for _ in range(21)]
        ),
        "--batch-size": 8,
        "--steps": 8,
        "--log-every": 1,
        "--learning-rate": 3e-3,
        # One program for each length and not two.
        "--gradients": "full",
    }
    return [str(word) for pair in flags.items() for word in pair]


def tune(*flags: object) -> int:
    """Runs the command in this process; returns its exit status."""
    return main([str(flag) for flag in flags])
