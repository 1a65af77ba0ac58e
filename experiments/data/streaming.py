"""Data streamed from Hugging Face into packed batches, resumable in mid-document.

Documents come shard by shard, are shuffled in blocks and packed. Every stage's state
says where to read again instead of what was read, so it stays small and JSON-able:

* Hugging Face's own ``shuffle`` is not used, because resuming loses what its buffer
  held. The shards are visited in an order of our own, and Grain shuffles blocks of
  documents, which it reads again when it resumes.
* Grain's ``ConcatThenSplitIterDataset`` is not used, because its state does not survive
  JSON: it compares slices with tuples, and loses a document (grain 0.2.18).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from experiments.data.hub import texts
from experiments.data.tokenizers import Tokenizer
from experiments.errors import UserError

_SHUFFLED_DOCUMENTS = 1024
_PREFETCHED_BATCHES = 8
_MOST_EMPTY_IN_A_ROW = 10_000


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents that are read while the run trains on them.

    Attributes:
        name: In words.
        dataset: A datasets.IterableDataset.
        column: That holds the text.
        held_out: How many of its last shards are not trained on.
    """

    name: str
    dataset: Any
    column: str = "text"
    held_out: int = 0

    @property
    def identity(self) -> tuple[str, str, int]:
        """What tells this stream from others."""
        return self.name, self.column, self.held_out

    @property
    def shards(self) -> int:
        """Shards to train on."""
        return self.dataset.num_shards - self.held_out

    def shard(self, index: int) -> Any:
        """Returns one shard, held out or not."""
        return self.dataset.shard(num_shards=self.dataset.num_shards, index=index)

    def texts(self, dataset: Any) -> Iterator[str]:
        """Yields the documents of the whole or of a shard."""
        return texts(dataset, self.column, self.name)


def packed_batches(
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> grain.IterDataset:
    """Returns an endless dataset of batches, prefetched by a thread.

    Every token of every document, and the end-of-document token behind it, is a target
    exactly once per pass over the shards; the end-of-document token stands before the
    first. All weights are 1. Passes differ in the order of shards and documents. Empty
    documents are skipped.

    Args:
        stream: The documents.
        tokenizer: Encodes the documents.
        batch_size: Windows per batch, B.
        sequence_length: Targets per window, T.
        seed: Seed of the orders, >= 0.

    Returns:
        Batches as everywhere: ``inputs``, ``targets``, ``weights`` of shape (B, T). The
        iterator's state is JSON-able; restoring it reads one block of documents again.
    """
    documents = ShardedDocuments(stream, seed)
    # Grain adds the block's number to the seed: a hashed one keeps runs unrelated.
    block_seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1
    shuffled = grain.experimental.WindowShuffleIterDataset(
        documents, window_size=_SHUFFLED_DOCUMENTS, seed=block_seed
    )
    packed = PackedDocuments(shuffled, tokenizer, sequence_length)
    batches = packed.batch(batch_size, drop_remainder=True)
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_PREFETCHED_BATCHES
    )


class ShardedDocuments(grain.IterDataset):
    """The documents of a stream without end, in a new shard order each pass.

    Documents without a character that is not white space are left out. Iterating raises
    UserError if the source fails, or has none but such documents.
    """

    def __init__(self, stream: Stream, seed: int):
        super().__init__()
        self._stream = stream
        self._seed = seed

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardedIterator(self._stream, self._seed)


class _ShardedIterator(grain.DatasetIterator):
    def __init__(self, stream, seed):
        super().__init__()
        self._stream = stream
        self._seed = seed
        self._pass = 0
        self._visited = 0
        self._pass_documents = 0
        self._open_shard()

    def __next__(self):
        empty = 0
        while not (text := next(self._texts, None)) or text.isspace():
            if text is None:
                self._next_shard()
                continue
            empty += 1
            if empty == _MOST_EMPTY_IN_A_ROW:
                raise UserError(
                    f"{self._stream.name}: {empty:,} documents in a row are empty in "
                    f"column {self._stream.column!r}; name another by --text-column"
                )
        self._pass_documents += 1
        return text

    def get_state(self):
        return {
            "pass": self._pass,
            "visited": self._visited,
            "pass_documents": self._pass_documents,
            "shard": self._shard.state_dict(),
        }

    def set_state(self, state):
        self._pass = state["pass"]
        self._visited = state["visited"]
        self._pass_documents = state["pass_documents"]
        self._open_shard(state["shard"])

    def _next_shard(self):
        self._visited += 1
        if self._visited == self._stream.shards:
            self._start_pass()
        self._open_shard()

    def _start_pass(self):
        if not self._pass_documents:
            raise UserError(
                f"{self._stream.name} has no text in column {self._stream.column!r}; "
                "name another by --text-column, or another source"
            )
        self._pass += 1
        self._visited = 0
        self._pass_documents = 0

    def _open_shard(self, state=None):
        rng = np.random.default_rng([self._seed, self._pass])
        order = rng.permutation(self._stream.shards)
        self._shard = self._stream.shard(int(order[self._visited]))
        if state is not None:
            self._shard.load_state_dict(state)
        self._texts = self._stream.texts(self._shard)


class PackedDocuments(grain.IterDataset):
    """Windows of T targets cut from the documents of an endless parent dataset."""

    def __init__(
        self, parent: grain.IterDataset, tokenizer: Tokenizer, sequence_length: int
    ):
        super().__init__(parent)
        self._tokenizer = tokenizer
        self._length = sequence_length

    def __iter__(self) -> grain.DatasetIterator:
        return _PackingIterator(iter(self._parent), self._tokenizer, self._length)


class _PackingIterator(grain.DatasetIterator):
    """Keeps the document being cut as [end, its tokens, end] and a place in it."""

    def __init__(self, parent, tokenizer, length):
        super().__init__(parent)
        self._tokenizer = tokenizer
        self._length = length
        self._end = np.asarray([tokenizer.end_of_document], np.int32)
        self._restart(parent.get_state())

    def __next__(self):
        inputs = np.empty(self._length, np.int32)
        targets = np.empty(self._length, np.int32)
        filled = 0
        while filled < self._length:
            if self._offset == len(self._document) - 1:
                self._read_document()
            available = self._document[self._offset :]
            taken = min(len(available) - 1, self._length - filled)
            inputs[filled : filled + taken] = available[:taken]
            targets[filled : filled + taken] = available[1 : taken + 1]
            filled += taken
            self._offset += taken
        weights = np.ones(self._length, np.float32)
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def get_state(self):
        return {"documents": self._before_document, "offset": self._offset}

    def set_state(self, state):
        self._parent.set_state(state["documents"])
        self._restart(state["documents"])
        if state["offset"]:
            self._read_document()
            self._offset = state["offset"]

    def _restart(self, parent_state):
        self._before_document = parent_state
        self._document = self._end
        self._offset = 0

    def _read_document(self):
        self._before_document = self._parent.get_state()
        ids = np.asarray(self._tokenizer.encode(next(self._parent)), np.int32)
        self._document = np.concatenate([self._end, ids, self._end])
        self._offset = 0
