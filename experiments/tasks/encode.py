"""Texts, pairs of texts and sequences of integers as an encoder's ids."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from experiments.errors import UserError
from experiments.tasks.rows import Rows, kind_of

# Of texts, as GLUE's recipes have it.
_DEFAULT_LENGTH = 512
_AT_ONCE = 10_000


class EncoderShape(Protocol):
    """What the data need to know of an encoder.

    Attributes:
        vocab_size: Every id is in [0, vocab_size).
        max_positions: Tokens of the longest sequence.
        type_vocab_size: Segments that are told apart, >= 1.
        padding_id: Stands behind the end of a sequence.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...
    @property
    def padding_id(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences of ids, one behind the other.

    Attributes:
        ids: (total,) int32.
        segments: (total,) int8; 1 in the second text of a pair, of an encoder that
            tells them apart.
        ends: Where each sequence ends, (n,) int64.
        cut: How many were longer than the most tokens, and lost their end.
    """

    ids: np.ndarray
    segments: np.ndarray
    ends: np.ndarray
    cut: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, (n,) int64."""
        return np.diff(self.ends, prepend=0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the ids of each sequence."""
        return iter(np.split(self.ids, self.ends[:-1]))


class TextEncoder:
    """Encodes as Hugging Face's ``AutoTokenizer`` does for the same directory.

    The post-processor of its ``tokenizer.json`` puts special tokens around a text or a
    pair and numbers the segments. What is too long is cut at the end, of a pair token
    by token from the longer text (``longest_first``). Text that spells a special token
    is this token.
    """

    def __init__(self, directory: Path, shape: EncoderShape):
        """Reads the tokenizer of an encoder.

        Raises:
            UserError: If the directory has no ``tokenizer.json``, or one that puts no
                special tokens around a text.
        """
        self._path = directory / "tokenizer.json"
        self._shape = shape
        if not self._path.is_file():
            raise UserError(
                f"{directory} has no tokenizer.json; save it there with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._model = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{self._path} is not a Hugging Face tokenizer ({error}); "
                "fetch it again"
            ) from error
        self._model.no_padding()
        self._model.no_truncation()
        # [CLS] a [SEP]; [CLS] a [SEP] b [SEP], or RoBERTa's four.
        if [self.special_tokens(n) for n in (1, 2)] not in ([2, 3], [2, 4]):
            raise UserError(
                f"{self._path} does not put an encoder's special tokens ([CLS] and "
                "[SEP], or <s> and </s>) around a text; use the tokenizer that the "
                "encoder was trained with"
            )

    def special_tokens(self, texts: int) -> int:
        """Returns the special tokens around one text, or around a pair."""
        return self._model.num_special_tokens_to_add(texts == 2)

    def encode(self, texts: Sequence[Sequence[str]], most: int) -> Sequences:
        """Encodes texts or pairs.

        Args:
            texts: One column of n texts, or two of the same length.
            most: Tokens of a sequence at most, more than special ones.

        Raises:
            UserError: If the tokenizer has ids that the encoder does not have.
        """
        columns = [texts[0]] if len(texts) == 1 else [list(zip(*texts, strict=True))]
        rows = columns[0]
        found, cut = [], 0
        for first in range(0, len(rows), _AT_ONCE):
            block = list(rows[first : first + _AT_ONCE])
            encoded = self._model.encode_batch(block)
            long = [i for i, one in enumerate(encoded) if len(one.ids) > most]
            self._model.enable_truncation(most, strategy="longest_first")
            for i, one in zip(
                long, self._model.encode_batch([block[i] for i in long]), strict=True
            ):
                encoded[i] = one
            self._model.no_truncation()
            cut += len(long)
            found += [
                (np.array(one.ids, np.int32), np.array(one.type_ids, np.int8))
                for one in encoded
            ]
        sequences = _joined(found, cut)
        self._check(sequences)
        if self._shape.type_vocab_size == 1:
            sequences.segments[:] = 0
        return sequences

    def _check(self, sequences):
        largest = sequences.ids.max()
        if largest >= self._shape.vocab_size:
            raise UserError(
                f"{self._path} gives the id {largest}, but the encoder's vocabulary is "
                f"0 to {self._shape.vocab_size - 1}; use the tokenizer that the "
                "encoder was trained with"
            )


def longest_sequence(shape: EncoderShape, asked: int | None, is_text: bool) -> int:
    """Returns the most tokens of a sequence.

    Args:
        shape: Of the encoder.
        asked: What the user wants; None: what the encoder has positions for, of texts
            at most 512.
        is_text: False: sequences of integers.

    Raises:
        UserError: If the encoder has not so many positions, or there are too few for
            the special tokens and a token of each text.
    """
    if asked is None:
        limit = _DEFAULT_LENGTH if is_text else shape.max_positions
        return min(shape.max_positions, limit)
    if asked > shape.max_positions:
        raise UserError(
            f"--max-length {asked}: the encoder has {shape.max_positions} positions; "
            f"give at most {shape.max_positions}"
        )
    least = 8 if is_text else 1
    if asked < least:
        raise UserError(f"--max-length {asked}: give at least {least}")
    return asked


def integer_sequences(
    rows: Rows, column: str, shape: EncoderShape, most: int
) -> Sequences:
    """Reads sequences of ids as they are: no special token is added.

    Args:
        rows: A value of the column is a list of integers, or text with integers
            between spaces or commas, as CSV has it.
        column: Of the sequences.
        shape: Of the encoder.
        most: Tokens of a sequence; what is behind is left out.

    Raises:
        UserError: If a row has no such sequence, or an id that the encoder has not.
    """
    found, cut = [], 0
    for value, place in zip(
        rows.column(column, "--text-columns"), rows.places, strict=True
    ):
        ids = _integers(value)
        if ids is None:
            raise UserError(
                f"{place}: column {column!r} holds {kind_of(value)}, not a sequence of "
                "integers; repair that row, or name another column by --text-columns"
            )
        wrong = [i for i in ids if not 0 <= i < shape.vocab_size]
        if wrong or not ids:
            what = f"the id {wrong[0]}" if wrong else "no id"
            raise UserError(
                f"{place}: column {column!r} has {what}; the encoder's vocabulary is 0 "
                f"to {shape.vocab_size - 1}"
            )
        cut += len(ids) > most
        kept = np.array(ids[:most], np.int32)
        found.append((kept, np.zeros(len(kept), np.int8)))
    return _joined(found, cut)


class EncodedExamples:
    """Sequences with labels: :class:`experiments.tasks.task_data.Examples`.

    A batch has ``tokens``, ``segments``, (B, T) int32, ``mask``, (B, T) float32, 1 on
    tokens and 0 on padding, ``labels``, (B,), int32 or float32, and ``weights``, (B,)
    float32, 1 on examples. Padding has one token, so that no softmax is empty.
    """

    def __init__(self, sequences: Sequences, labels: np.ndarray, padding_id: int):
        self._sequences = sequences
        self._padding_id = padding_id
        self.lengths = sequences.lengths
        self.labels = labels

    def batch(self, index: np.ndarray, length: int) -> dict[str, np.ndarray]:
        shape = (len(index), length)
        tokens = np.full(shape, self._padding_id, np.int32)
        segments = np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        mask[:, 0] = 1
        labels = np.zeros(len(index), self.labels.dtype)
        for row, place in enumerate(index):
            if place >= 0:
                stop = self._sequences.ends[place]
                count = self.lengths[place]
                tokens[row, :count] = self._sequences.ids[stop - count : stop]
                segments[row, :count] = self._sequences.segments[stop - count : stop]
                mask[row, :count] = 1
                labels[row] = self.labels[place]
        return {
            "tokens": tokens,
            "mask": mask,
            "segments": segments,
            "labels": labels,
            "weights": (index >= 0).astype(np.float32),
        }

    def digest(self) -> bytes:
        parts = self._sequences
        digest = hashlib.sha256()
        for array in (parts.ids, parts.segments, parts.ends, self.labels):
            digest.update(hashlib.sha256(array.tobytes()).digest())
        return digest.digest()


def _integers(value) -> list[int] | None:
    if isinstance(value, str):
        try:
            return list(map(int, value.replace(",", " ").split()))
        except ValueError:
            return None
    if not isinstance(value, Iterable):
        return None
    value = list(value)
    return value if all(type(one) is int for one in value) else None


def _joined(found, cut):
    ids, segments = zip(*found, strict=True)
    ends = np.cumsum([len(one) for one in ids], dtype=np.int64)
    return Sequences(np.concatenate(ids), np.concatenate(segments), ends, cut)
