"""Writes down the batches of a suite's runs, and reads them again."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.suite import Suite
from experiments.comparison.suites import SUITES
from experiments.run.step import BATCH


@dataclasses.dataclass(frozen=True)
class Texts:
    """The batches of all runs, of S streams over V texts.

    Attributes:
        streams: Text and seed of each stream.
        tokens: (S, steps, batch, length + 1), unsigned; targets are one token ahead.
        weights: Of the targets, (S, steps, batch, length); 0 for padding.
        validation: Arrays of validation batches by name, (V, batches, batch, length).
        text: Number of each stream's text.
        data: Description of each text.
        vocab_size: Tokens of the tokenizer.
    """

    streams: Sequence[tuple[str, int]]
    tokens: np.ndarray
    weights: np.ndarray
    validation: Mapping[str, np.ndarray]
    text: Sequence[int]
    data: Sequence[str]
    vocab_size: int

    def save(self, path: Path) -> None:
        """Writes a file."""
        said = {
            "streams": self.streams,
            "text": self.text,
            "data": self.data,
            "vocab_size": self.vocab_size,
        }
        arrays: dict[str, Any] = {
            "train_tokens": self.tokens,
            "train_weights": self.weights,
            "said": np.asarray(json.dumps(said)),
            **self.validation,
        }
        np.savez_compressed(path, **arrays)


def load(path: Path) -> Texts:
    """Reads a file of :meth:`Texts.save`."""
    with np.load(path) as file:
        said = json.loads(str(file["said"]))
        streams = [(name, seed) for name, seed in said.pop("streams")]
        validation = {name: file[name] for name in BATCH}
        train = (file["train_tokens"], file["train_weights"])
        return Texts(streams, *train, validation, **said)


def recorded(suite: Suite, texts: Mapping[str, str], seeds: int, steps: int) -> Texts:
    """Returns the batches that the command would train on.

    Args:
        suite: A suite that pre-trains.
        texts: Name of a text -> training data, and behind a comma validation data.
        seeds: Number of seeds.
        steps: Batches of each stream.
    """
    from experiments.run.assemble import assemble
    from experiments.run.config import PRETRAINING

    streams, numbers, described = [], [], []
    train: list[tuple[np.ndarray, np.ndarray]] = []
    validation: dict[str, list[np.ndarray]] = {name: [] for name in BATCH}
    size = 0
    for number, (name, spec) in enumerate(texts.items()):
        source, _, held_out = spec.partition(",")
        for seed in range(seeds):
            config = PRETRAINING.options(
                **suite.flags,
                data=source,
                validation_data=held_out or None,
                tokenizer="bytes",
                seed=seed,
                out=Path("never-written"),
            )
            work = assemble(config, print).work
            size = work.tokenizer.vocab_size
            with contextlib.closing(work.train_iterator()) as batches:
                found = [_joined(next(batches)) for _ in range(steps)]
            streams.append((name, seed))
            numbers.append(number)
            tokens, weights = map(np.stack, zip(*found, strict=True))
            train.append((tokens, weights))
            print(f"{name}, seed {seed}: {steps} batches", flush=True)
            if seed == 0:
                described.append(work.description)
                of_text = list(work.data.validation_batches(config.eval_tokens))
                for key in BATCH:
                    arrays = [np.asarray(batch[key]) for batch in of_text]
                    validation[key].append(np.stack(arrays))
    least = {"inputs": np.uint16, "targets": np.uint16, "weights": np.uint8}
    stacked = {k: np.stack(x).astype(least[k]) for k, x in validation.items()}
    tokens, weights = map(np.stack, zip(*train, strict=True))
    return Texts(streams, tokens, weights, stacked, numbers, described, size)


def _joined(batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a batch as windows of one token more, and the targets' weights."""
    inputs, targets, weights = (np.asarray(batch[name]) for name in BATCH)
    counts = weights[:, :-1] == 1
    assert np.array_equal(inputs[:, 1:][counts], targets[:, :-1][counts])
    tokens = np.concatenate([inputs, targets[:, -1:]], axis=1)
    return tokens.astype(np.uint16), weights.astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together.texts")
    parser.add_argument("texts", nargs="+", metavar="NAME=TRAIN[,VALIDATION]")
    parser.add_argument("--suite", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="in the place of the suite's")
    parser.add_argument("--out", type=Path, required=True, help="a file, .npz")
    options = parser.parse_args()
    steps = options.steps or SUITES[options.suite].flags["steps"]
    texts = dict(text.split("=", 1) for text in options.texts)
    recorded(SUITES[options.suite], texts, options.seeds, steps).save(options.out)


if __name__ == "__main__":
    main()
