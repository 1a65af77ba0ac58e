"""Prompts and answers as the data that a decoder is fine-tuned on."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.errors import UserError
from experiments.tasks.answers import Pair, Prompts, read_exchanges
from experiments.tasks.describe import Part, describe, sizes
from experiments.tasks.exact_match import reference
from experiments.tasks.rows import Rows
from experiments.tasks.task_data import TaskData, make_task_data


class AnswerExamples:
    """Pairs of one split, see :class:`experiments.tasks.task_data.Examples`.

    A pair of p and a tokens is predicted from its first p + a - 1 tokens. Targets of
    the prompt have weight 0, those of the answer weight 1.

    Attributes:
        pairs: Each with at least one token of both.
        lengths: p + a - 1 of each pair, (n,).
        labels: None for a text: shape (n, 0).
    """

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = pairs
        self.lengths = np.array([len(p) + len(a) - 1 for p, a in pairs], np.int64)
        self.labels = np.zeros((len(pairs), 0))

    def batch(self, index: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Returns padded pairs.

        Args:
            index: Places of the pairs, (B,); -1 gives weights of 0 alone.
            length: T, at least their lengths.

        Returns:
            ``inputs`` and ``targets``, (B, T) int32, padded with 0, and ``weights``,
            (B, T) float32.
        """
        tokens = np.zeros((len(index), length + 1), np.int32)
        weights = np.zeros((len(index), length), np.float32)
        for row, place in enumerate(index):
            if place >= 0:
                prompt, answer = self.pairs[place]
                end = len(prompt) + len(answer)
                tokens[row, :end] = np.concatenate([prompt, answer])
                weights[row, len(prompt) - 1 : end - 1] = 1
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def digest(self) -> bytes:
        """Returns a hash of all ids, and of where the answers begin."""
        digest = hashlib.sha256()
        for part in (ids for pair in self.pairs for ids in pair):
            digest.update(np.int64(len(part)).tobytes())
            digest.update(np.asarray(part, np.int32).tobytes())
        return digest.digest()


def cut(pair: Pair, max_length: int) -> Pair:
    """Cuts a prompt on the left, at most to its last token, so that the pair fits.

    Args:
        pair: With at least one token of both.
        max_length: Most tokens that the model reads of a pair, >= 1: all but its last.
    """
    room = max(1, max_length + 1 - len(pair.answer))
    return pair._replace(prompt=pair.prompt[-room:])


def fit(pairs: Sequence[Pair], max_length: int) -> tuple[list[Pair], int]:
    """Cuts the pairs that are too long, and leaves out those that still are.

    Args:
        pairs: With at least one token of both.
        max_length: As in :func:`cut`.

    Returns:
        The pairs that fit, and how many of them were cut.

    Raises:
        UserError: If none fits.
    """
    fitting = [pair for pair in pairs if len(pair.answer) <= max_length]
    if not fitting:
        raise UserError(
            f"every answer is longer than --max-length {max_length}; give a larger one"
        )
    kept = [cut(pair, max_length) for pair in fitting]
    sizes = zip(fitting, kept, strict=True)
    return kept, sum(len(new.prompt) < len(old.prompt) for old, new in sizes)


def first_answered(
    prompts: Prompts, rows: Rows, most: int, question: str, answer: str, length: int
) -> Rows:
    """Returns the first rows of a validation part, those that a model is to answer.

    Args:
        prompts: Of the task. Of completions, only rows whose answers fit are returned.
        rows: Of the part, one or more.
        most: Most rows to return, >= 1.
        question: Column of the questions.
        answer: Column of the answers.
        length: Most tokens of an answer.

    Raises:
        UserError: If a problem's solution has no number; the row is named.
    """
    first = range(min(most, len(rows)))
    if prompts.task != "completion":
        chosen = rows.take(first, rows.name)
        if prompts.task == "gsm8k":
            _check_solutions(chosen, question, answer)
        return chosen
    found: list[int] = []
    for begin in range(0, len(rows), most):
        places = range(begin, min(begin + most, len(rows)))
        exchanges = read_exchanges(rows.take(places, rows.name), question, answer)
        pairs = zip(places, prompts.encode(exchanges), strict=True)
        found += [place for place, pair in pairs if len(pair.answer) <= length]
        if len(found) >= most:
            break
    return rows.take(found[:most] or first, rows.name)


def _check_solutions(rows: Rows, question: str, answer: str) -> None:
    exchanges = read_exchanges(rows, question, answer)
    for exchange, place in zip(exchanges, rows.places, strict=True):
        try:
            reference(exchange.answer)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def make_answer_data(
    prompts: Prompts,
    train: Rows,
    validation: Mapping[str, Rows],
    *,
    text_column: str,
    answer_column: str,
    vocab_size: int,
    max_length: int,
    batch_size: int,
    seed: int,
) -> TaskData:
    """Encodes rows of questions and answers.

    Args:
        prompts: How they are put to the model.
        train: To train on.
        validation: By the name of their split.
        text_column: Holds the question.
        answer_column: Holds the answer.
        vocab_size: Of the model.
        max_length: As in :func:`fit`.
        batch_size: Examples per batch, >= 1.
        seed: Of the training order, in [0, 2**32).

    Raises:
        UserError: If a number is out of range, a column is absent or holds no text, no
            answer of a split fits, or a chat has a token that the model has not.
    """
    if max_length < 1:
        raise UserError(f"--max-length is {max_length}; give at least 1")
    examples, described = [], []
    for name, rows in {"training": train, **validation}.items():
        pairs = prompts.encode(read_exchanges(rows, text_column, answer_column))
        largest = max(int(ids.max(initial=0)) for pair in pairs for ids in pair)
        if largest >= vocab_size:
            raise UserError(
                f"{rows.name}: the chat template writes the token {largest}, the model "
                f"has 0 to {vocab_size - 1}; give --prompt plain, or put the tokenizer "
                "there that the model was trained with"
            )
        try:
            kept, count = fit(pairs, max_length)
        except UserError as error:
            raise UserError(f"{rows.name}: {error}") from error
        examples.append(AnswerExamples(kept))
        words = [sizes(examples[-1].lengths)]
        if count:
            words.append(
                f"{count:,} prompts cut on the left to fit {max_length} tokens"
            )
        if left_out := len(pairs) - len(kept):
            words.append(f"{left_out:,} left out: the answer alone is longer")
        keys = [ids.tobytes() for ids in map(np.concatenate, kept)]
        described.append(Part(name, rows.name, words, keys))
    return make_task_data(
        examples[0],
        dict(zip(validation, examples[1:], strict=True)),
        description=describe(described),
        label_names=(),
        batch_size=batch_size,
        seed=seed,
    )
