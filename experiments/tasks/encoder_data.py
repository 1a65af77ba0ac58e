"""Rows of texts and labels as the data that an encoder is fine-tuned on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.tasks.describe import Part, describe, sizes
from experiments.tasks.encode import (
    EncodedExamples,
    EncoderShape,
    Sequences,
    TextEncoder,
    integer_sequences,
    longest_sequence,
)
from experiments.tasks.labels import read_labels
from experiments.tasks.rows import Rows
from experiments.tasks.table import TaskKind
from experiments.tasks.task_data import TaskData, make_task_data

_MOST_SHARES = 8


def make_encoder_data(
    task: TaskKind,
    train: Rows,
    validation: Mapping[str, Rows],
    *,
    directory: Path,
    shape: EncoderShape,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    max_length: int | None = None,
    batch_size: int,
    seed: int,
) -> TaskData:
    """Encodes rows of texts, pairs of texts or integers, and their labels.

    Args:
        task: Of kind "classes" or "number".
        train: To train on.
        validation: By the name of their split.
        directory: Of the encoder; its ``tokenizer.json`` encodes the texts.
        shape: Of the encoder.
        text_columns: One column or, of texts, two; none: the task's own.
        label_column: None: the task's own.
        max_length: Tokens of a sequence, special ones among them; None: see
            :func:`experiments.tasks.encode.longest_sequence`.
        batch_size: Examples per batch, >= 1.
        seed: Of the training order, in [0, 2**32).

    Returns:
        Batches as :class:`experiments.tasks.encode.EncodedExamples` makes them.

    Raises:
        UserError: If a column is absent or holds something else, a label or a number
            is out of range, or the tokenizer is not an encoder's.
    """
    columns = tuple(text_columns) or task.text_columns
    _check_columns(columns, task)
    parts = {"training": train, **validation}
    label_names, train_labels, labels = read_labels(
        task, train, dict(validation), label_column or task.label_column
    )
    most = longest_sequence(shape, max_length, task.is_text)
    encoder = TextEncoder(directory, shape) if task.is_text else None
    examples, described = [], []
    for name, part_labels in zip(parts, [train_labels, *labels.values()], strict=True):
        rows = parts[name]
        if encoder is None:
            sequences = integer_sequences(rows, columns[0], shape, most)
        else:
            sequences = encoder.encode(list(map(rows.texts, columns)), most)
        examples.append(EncodedExamples(sequences, part_labels, shape.padding_id))
        words = [_sizes(sequences, most), _labels_in_words(part_labels, label_names)]
        keys = [ids.tobytes() for ids in sequences]
        described.append(Part(name, rows.name, words, keys))
    return make_task_data(
        examples[0],
        dict(zip(validation, examples[1:], strict=True)),
        description=describe(described),
        label_names=label_names,
        batch_size=batch_size,
        seed=seed,
        longest=shape.max_positions,
    )


def _check_columns(columns, task):
    most = 2 if task.is_text else 1
    if len(columns) > most:
        wanted = "one text or a pair" if task.is_text else "one sequence of integers"
        raise UserError(
            f"--text-columns has {len(columns)} columns, but the task reads {wanted}; "
            f"name at most {most}"
        )


def _sizes(sequences: Sequences, most: int) -> str:
    words = sizes(sequences.lengths)
    if sequences.cut:
        words += f" ({sequences.cut:,} of them cut there: longer than {most})"
    return words


def _labels_in_words(labels, names):
    if not names:
        return f"labels {labels.min():g} to {labels.max():g}"
    shares = np.bincount(labels, minlength=len(names)) / len(labels)
    order = np.argsort(-shares, kind="stable")[:_MOST_SHARES]
    listed = ", ".join(f"{names[i]} {100 * shares[i]:.1f} %" for i in order)
    return listed + f", and {len(names) - len(order)} more" * (len(names) > len(order))
