"""From ``--data`` to batches: deterministic, prefetched, resumable bit for bit."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import grain
import numpy as np

from experiments.data.overlap import Overlap
from experiments.data.packing import (
    JoinedDocuments,
    OwnRows,
    Windows,
    join_documents,
    padded_batches,
)
from experiments.data.sources import open_source, open_text
from experiments.data.streaming import Stream, packed_batches
from experiments.data.tokenizers import Tokenizer
from experiments.errors import UserError

_MAX_HELD_OUT_TOKENS = 500_000
# The tokens are in memory already: more threads would only contend for the
# interpreter, and one is enough to have the next batches ready.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True)
class Data:
    """Input of a training run.

    A batch is a dict of ``inputs`` and ``targets``, int32, and ``weights``, float32, of
    shape (batch_size, sequence_length); weight 0 marks padding.

    Attributes:
        description: What is trained and what is validated on, a line each.
        train_tokens: Tokens of one epoch, ends of documents included; None: streamed.
        validation_tokens: The same for the validation text.
        bytes_per_token: UTF-8 bytes of the validation text per token of it.
        token_digest: Hex digest of all tokens (of the stream's name and the validation
            tokens where training is streamed): a resumed run refuses another one.
        train_dataset: Endless batches.
        validation_windows: The validation text.
        batch_size: Windows per batch.
    """

    description: str
    train_tokens: int | None
    validation_tokens: int
    bytes_per_token: float
    token_digest: str
    train_dataset: grain.IterDataset
    validation_windows: Windows
    batch_size: int

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns a new iterator over training batches, from the start, without end.

        Its ``get_state()`` is JSON-able, and ``set_state`` continues exactly behind the
        batch returned last. ``close()`` ends its prefetching thread.
        """
        return self.train_dataset.__iter__()

    def epochs(self, batches: int) -> float | None:
        """Returns the passes over the training text in so many batches.

        None: the text is streamed, and its length is not known.
        """
        if self.train_tokens is None:
            return None
        windows = -(-(self.train_tokens - 1) // self.validation_windows.length)
        return batches * self.batch_size / windows

    def validation_batches(
        self, max_tokens: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns the same batches on every call and for every seed.

        Args:
            max_tokens: Targets of weight 1 in all, >= 1, taken in windows that are
                spread evenly over the text; None or more than there are: each of the
                ``validation_tokens - 1`` targets once.

        Raises:
            UserError: If ``max_tokens`` is below 1.
        """
        if max_tokens is None:
            max_tokens = self.validation_windows.target_count
        if max_tokens < 1:
            raise UserError(f"validation needs at least 1 token, got {max_tokens}")
        return padded_batches(self.validation_windows, self.batch_size, max_tokens)


def make_data(
    spec: str,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    validation_spec: str | None = None,
    text_column: str = "text",
    rows: Collection[int] | None = None,
    report: Callable[[str], None] | None = None,
) -> Data:
    """Reads, tokenizes and packs text.

    Args:
        spec: ``embedded`` (the standard library's sources), ``c4`` or ``hub:...``
            (streamed from Hugging Face, see :mod:`experiments.data.hub`), or a path,
            folder or glob, see :mod:`experiments.data.files`.
        tokenizer: Encodes the documents.
        batch_size: Windows per batch, >= 1.
        sequence_length: Targets per window, >= 1.
        seed: Seed of the training order, in [0, 2**32).
        validation_spec: The same for the validation text, but ``embedded``. None:
            ``embedded``, ``c4`` and what else has a validation split on the hub have
            their own; of the hub's others, the last file is held out; of files here,
            the last 5 % of the tokens, at least one window and at most 500,000.
        text_column: Of JSON lines, Parquet and the hub's data sets, that holds text.
        rows: Sequences of each training batch that this process has to read, from 0 on;
            the others are of zeros. Which text a sequence has does not depend on them.
            Streamed text is read whole. None: all.
        report: Called with a line of progress every few seconds while tokenizing.

    Raises:
        UserError: If a number is out of range, the text cannot be read or is empty, a
            file or the whole validation text is in both parts, or there is less than
            one window to train on (and one to hold out).
    """
    _check_numbers(batch_size, sequence_length, seed)
    source = open_source(spec, validation_spec, text_column)
    join = functools.partial(_join, tokenizer=tokenizer, report=report)
    overlap = Overlap()
    validation_text = train_text = None
    if source.validation is not None:
        documents = overlap.remember(source.validation)
        limit = source.max_validation_tokens
        validation_text = join(documents, source.validation_name, max_tokens=limit)
        _check_enough(validation_text.tokens, 1, source.validation_name)
    if not isinstance(source.train, Stream):
        train_text = join(overlap.compare(source.train), source.name)
    train, validation, description = _parts(
        source, train_text, validation_text, overlap, sequence_length
    )

    if isinstance(source.train, Stream):
        identity = repr(source.train.identity).encode()
        dataset = packed_batches(
            source.train,
            tokenizer,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
        )
    else:
        identity = train
        _check_enough(train, sequence_length, source.name)
        windows = Windows(train, sequence_length)
        dataset = _shuffled_batches(windows, batch_size, seed, rows)
    return Data(
        description=description,
        train_tokens=None if train is None else len(train),
        validation_tokens=len(validation),
        bytes_per_token=_bytes_per_token(
            validation_text or train_text, len(validation)
        ),
        token_digest=_digest(identity, validation),
        train_dataset=dataset,
        validation_windows=Windows(validation, sequence_length),
        batch_size=batch_size,
    )


def read_text(
    spec: str,
    tokenizer: Tokenizer,
    text_column: str,
    max_tokens: int | None,
    report: Callable[[str], None] | None = None,
) -> tuple[str, JoinedDocuments]:
    """Reads and tokenizes one text that is not trained on.

    Args:
        spec: What ``validation_spec`` of :func:`make_data` may be, or ``embedded``: its
            validation part.
        tokenizer: Encodes the documents.
        text_column: As in :func:`make_data`.
        max_tokens: Targets, at most; None: all of the text.
        report: Called with a line of progress every few seconds.

    Returns:
        The text in words, and its tokens: one more than targets.

    Raises:
        UserError: If it cannot be read, is empty, or has one token alone.
    """
    name, documents = open_text(spec, text_column)
    most = None if max_tokens is None else max_tokens + 1
    text = _join(documents, name, tokenizer=tokenizer, max_tokens=most, report=report)
    _check_enough(text.tokens, 1, name)
    return name, text


def _join(documents, name, **options):
    text = join_documents(documents, **options)
    if not text.documents:
        raise UserError(
            f"{name} has no text: {text.empty:,} documents, all of them empty; give "
            "other data, or another --text-column"
        )
    return text


def _parts(
    source, train_text, validation_text, overlap, length
) -> tuple[Any, Any, str]:
    """Returns tokens to train on (None: streamed), those to validate on, and words."""
    train, description = None, f"training: {source.name}"
    if train_text is not None:
        train, description = train_text.tokens, f"{description}: {train_text}"
    if validation_text is None:
        train, validation = _hold_out(train, length, source.name)
        held_out = f"the last {len(validation):,} of them, held out"
        return train, validation, f"{description}\nvalidation: {held_out}"
    if overlap.is_whole:
        raise UserError(
            f"every document of the validation text, {source.validation_name}, is in "
            f"the training text, {source.name}, too; give text that is not trained on"
        )
    description += f"\nvalidation: {source.validation_name}: {validation_text}"
    if overlap.shared:
        description += f"; {overlap.shared:,} of them are in the training text, too"
    return train, validation_text.tokens, description


def _check_numbers(batch_size, sequence_length, seed):
    sizes = {"batch size": batch_size, "sequence length": sequence_length}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"the {name} must be at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed must be at least 0 and below 2**32, got {seed}")


def _hold_out(tokens, length, name):
    """Splits tokens of shape (n,) into (all but the last 5 %, the last 5 %)."""
    needed = 2 * (length + 1)
    if len(tokens) < needed:
        raise UserError(
            f"{name} has {len(tokens):,} tokens, but a window of {length:,} to train "
            f"on and one to hold out for validation take {needed:,}; give more text, "
            "a shorter sequence or a validation text of its own"
        )
    held_out = max(min(len(tokens) // 20, _MAX_HELD_OUT_TOKENS), length + 1)
    return tokens[:-held_out], tokens[-held_out:]


def _bytes_per_token(text, count):
    """Returns the UTF-8 bytes per token of the last ``count`` tokens of a text."""
    total = len(text.tokens)
    return text.bytes_between(total - count, total) / count


def _check_enough(tokens, targets, name):
    if len(tokens) < targets + 1:
        raise UserError(
            f"{name} has {len(tokens):,} tokens, but {targets + 1:,} are needed to "
            f"predict {targets:,}; give more text or a shorter sequence"
        )


def _shuffled_batches(windows, batch_size, seed, rows):
    """Returns endless batches: all windows once per epoch, each in a new order."""
    # `seed` before `shuffle` hashes the seed; `shuffle(seed)` would give epoch 1 of
    # seed 0 the order of epoch 0 of seed 1. A batch may hold the end of one epoch and
    # the beginning of the next, so that none is cut short.
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    if rows is not None and len(rows) < batch_size:
        dataset = OwnRows(dataset, batch_size, rows)
    return dataset.batch(batch_size).to_iter_dataset(_READ_OPTIONS)


def _digest(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
