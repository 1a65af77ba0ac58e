"""Documents joined into one row of tokens, and that row cut into training windows."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import grain
import numpy as np

from experiments.data.tokenizers import Tokenizer

_CHUNK_CHARACTERS = 1 << 20
_REPORT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class JoinedDocuments:
    """Documents as tokens, each followed by the end-of-document token.

    There are no empty ones: pairs of ends have nothing to teach but themselves.

    Attributes:
        tokens: Shape (n,), the smallest unsigned dtype that holds the vocabulary.
        documents: How many they are.
        empty: Those left out beside them: without a token of their own, or without a
            character that is not white space.
        ends: Tokens, and UTF-8 bytes, up to the end of each document, from (0, 0) on;
            int64 of shape (documents + 1, 2).
    """

    tokens: np.ndarray
    documents: int
    empty: int
    ends: np.ndarray

    def bytes_between(self, start: int, stop: int) -> float:
        """Returns the UTF-8 bytes of ``tokens[start:stop]``.

        Within one document the bytes count as spread evenly over its tokens.
        """
        before, after = np.interp((start, stop), *self.ends.T)
        return float(after - before)

    def __str__(self) -> str:
        empty = f" ({self.empty:,} empty, skipped)" if self.empty else ""
        return f"{len(self.tokens):,} tokens in {self.documents:,} documents{empty}"


def join_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    report: Callable[[str], None] | None = None,
) -> JoinedDocuments:
    """Tokenizes documents and joins them.

    Args:
        documents: Text; read once, no further than needed.
        tokenizer: Encodes them.
        max_tokens: Stop here, in the middle of a document if need be; None: read all.
        report: Called with a line of progress every few seconds.
    """
    last_token = max(tokenizer.vocab_size - 1, tokenizer.end_of_document)
    dtype = np.min_scalar_type(last_token)
    end = np.asarray([tokenizer.end_of_document], dtype)
    pieces, count, empty, total = [], 0, 0, 0
    ends = [(0, 0)]
    last_report = time.monotonic()
    for chunk in _chunks(documents):
        for text, ids in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            if not len(ids) or text.isspace():
                empty += 1
                continue
            pieces += [np.asarray(ids).astype(dtype), end]
            count += 1
            total += len(ids) + 1
            ends.append((total, ends[-1][1] + len(text.encode())))
        if max_tokens is not None and total >= max_tokens:
            break
        if report is not None and time.monotonic() - last_report > _REPORT_SECONDS:
            report(f"tokenized {count:,} documents, {total:,} tokens")
            last_report = time.monotonic()
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    return JoinedDocuments(tokens[:max_tokens], count, empty, np.array(ends))


class Windows:
    """Random access to windows of ``length`` targets; a Grain data source.

    Window i predicts ``tokens[i * length + 1 : (i + 1) * length + 1]`` from the tokens
    one place before, so every token but the first is a target in exactly one window.
    The last window is padded with token 0 and weight 0.

    Attributes:
        tokens: Shape (n,), n >= 2, integer.
        length: Targets per window, T, >= 1.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens = tokens
        self.length = length

    @property
    def target_count(self) -> int:
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return -(-self.target_count // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns ``inputs`` and ``targets`` (T,) int32, ``weights`` (T,) float32."""
        start = index * self.length
        piece = self.tokens[start : start + self.length + 1]
        padded = np.zeros(self.length + 1, np.int32)
        padded[: len(piece)] = piece
        weights = np.zeros(self.length, np.float32)
        weights[: len(piece) - 1] = 1
        return {"inputs": padded[:-1], "targets": padded[1:], "weights": weights}


class OwnRows(grain.MapDataset):
    """Windows of which only some are read; the others are of zeros.

    Element i is sequence i % batch_size of its batch.

    Args:
        windows: All of them, in the order of the run.
        batch_size: Windows per batch.
        rows: Those of each batch that are read.
    """

    def __init__(
        self, windows: grain.MapDataset, batch_size: int, rows: Collection[int]
    ):
        super().__init__(windows)
        self._batch_size, self._rows = batch_size, rows
        like: Any = windows[next(iter(rows))]
        self._empty = {name: np.zeros_like(x) for name, x in like.items()}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        if index % self._batch_size in self._rows:
            return self._parent[index]
        return self._empty


def padded_batches(
    windows: Windows, batch_size: int, max_targets: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches whose weights sum to min(max_targets, windows.target_count).

    The windows are spread evenly over the text, so that a small ``max_targets`` still
    sees all of it, and each is used once. Always the same batches.

    Args:
        windows: What to read.
        batch_size: Windows per batch; the last batch is filled up with weight 0.
        max_targets: Targets of weight 1 in all, >= 1.
    """
    remaining = min(max_targets, windows.target_count)
    count = -(-remaining // windows.length)
    chosen = np.arange(count) * len(windows) // count
    for first in range(0, count, batch_size):
        batch = [windows[index] for index in chosen[first : first + batch_size]]
        for window in batch:
            window["weights"][remaining:] = 0
            remaining = max(remaining - windows.length, 0)
        yield grain.experimental.batch_and_pad(batch, batch_size=batch_size)


def _chunks(documents):
    """Yields lists of documents of about a million characters in all."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document) + 1
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
