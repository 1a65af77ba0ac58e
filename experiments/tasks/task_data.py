"""From examples to batches: deterministic, dynamically padded, resumable exactly."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import grain
import numpy as np

from experiments.errors import UserError
from experiments.tasks.buckets import bucket_lengths, bucket_of, in_order_of_length

# The examples are in memory already: one thread is enough.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


class Examples(Protocol):
    """The examples of one split, encoded, in memory.

    Attributes:
        lengths: Tokens of each, as they are padded, (n,), integers >= 1.
        labels: (n,), what :func:`experiments.tasks.metrics.score` compares with.
    """

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...

    def batch(self, index: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Returns arrays that begin with an axis of B examples.

        Args:
            index: Places of the examples, (B,) int32, each of at most ``length``
                tokens; -1: padding, whose ``weights`` are 0.
            length: T, that they are padded to.
        """
        ...

    def digest(self) -> bytes:
        """Returns a hash of everything that a batch can hold."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Input of a fine-tuning run.

    A batch has what :meth:`Examples.batch` returns, and ``index``, (B,) int32, places
    of the examples in their split, -1 for padding, and ``draw``, (B,) uint32, another
    number for every example of every epoch (of 2**32 of them), from which dropout draws
    its key; 0 in validation. The last batch of an epoch is filled up with padding.

    Attributes:
        description: What is trained and what is validated on, a line each.
        digest: Hex digest of all ids and labels: a resumed run refuses another one.
        label_names: Of the classes, in the order of their numbers; else empty.
        bucket_lengths: T of every batch is one of them.
        train: Training examples.
        validation: Validation examples by the name of their split.
        batch_size: B, examples per batch.
        seed: Of the training order.
    """

    description: str
    digest: str
    label_names: tuple[str, ...]
    bucket_lengths: tuple[int, ...]
    train: Examples
    validation: Mapping[str, Examples]
    batch_size: int
    seed: int

    @property
    def train_examples(self) -> int:
        """Examples of one epoch."""
        return len(self.train.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold each training example once."""
        return -(-self.train_examples // self.batch_size)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the validation splits; the first is the primary one."""
        return tuple(self.validation)

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels of a validation split in its order, (n,)."""
        return self.validation[split].labels

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns a new iterator over training batches, from the start, without end.

        Its ``get_state()`` is JSON-able, and ``set_state`` continues exactly behind the
        batch returned last. ``close()`` ends its prefetching thread.
        """
        # `seed` before `shuffle` hashes the seed; `shuffle(seed)` would give epoch 1 of
        # seed 0 the order of epoch 0 of seed 1. Batches are made within an epoch.
        dataset = grain.MapDataset.range(self.train_examples).seed(self.seed).shuffle()
        dataset = dataset.batch(self.batch_size, drop_remainder=False).repeat()
        return iter(
            dataset.map_with_index(self._train_batch).to_iter_dataset(_READ_OPTIONS)
        )

    def batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        """Yields each example of a validation split once, in order of length."""
        examples = self.validation[split]
        for places in in_order_of_length(examples.lengths, self.batch_size):
            yield self._batch(examples, places, np.zeros(self.batch_size, np.uint32))

    def _train_batch(self, number, places):
        first = number * self.batch_size
        draw = np.arange(first, first + self.batch_size, dtype=np.uint64)
        return self._batch(self.train, places, draw.astype(np.uint32))

    def _batch(self, examples, places, draw):
        length = bucket_of(examples.lengths[places].max(), self.bucket_lengths)
        index = np.full(self.batch_size, -1, np.int32)
        index[: len(places)] = places
        return {**examples.batch(index, length), "index": index, "draw": draw}


def make_task_data(
    train: Examples,
    validation: Mapping[str, Examples],
    *,
    description: str,
    label_names: tuple[str, ...],
    batch_size: int,
    seed: int,
    longest: int | None = None,
) -> TaskData:
    """Chooses the buckets, and puts together what a run is fine-tuned on.

    Args:
        train: Training examples, at least one.
        validation: Validation examples by the name of their split, at least one each.
        description: Of both; a line on the buckets is added.
        label_names: Of the classes; else empty.
        batch_size: Examples per batch, >= 1.
        seed: Seed of the training order, in [0, 2**32).
        longest: As in :func:`experiments.tasks.buckets.bucket_lengths`.

    Raises:
        UserError: If a number is out of range.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed must be at least 0 and below 2**32, got {seed}")
    lengths = [examples.lengths for examples in validation.values()]
    buckets = bucket_lengths(train.lengths, lengths, batch_size, longest)
    digest = hashlib.sha256(repr((*validation, *label_names)).encode())
    for examples in (train, *validation.values()):
        digest.update(examples.digest())
    return TaskData(
        description=f"{description}\n{_words(buckets)}",
        digest=digest.hexdigest()[:16],
        label_names=label_names,
        bucket_lengths=buckets,
        train=train,
        validation=validation,
        batch_size=batch_size,
        seed=seed,
    )


def _words(buckets):
    count = len(buckets)
    times = "once" if count == 1 else f"at most {count} times"
    lengths = ", ".join(map(str, buckets))
    return (
        f"batches: padded to {lengths} tokens: the training step and the evaluation "
        f"are each compiled {times}"
    )
