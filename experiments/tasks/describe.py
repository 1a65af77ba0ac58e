"""What a run trains and validates on, in words: a line a part."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Examples to train on, or those of a validation split.

    Attributes:
        name: "training", or the split.
        source: Where the examples come from.
        words: What there is to say of them.
        keys: Equal for equal examples.
    """

    name: str
    source: str
    words: Sequence[str]
    keys: Sequence[bytes]


def describe(parts: Iterable[Part]) -> str:
    """Returns a line on each part; the training part comes first.

    It says how many examples of a split are in the training part, too.
    """
    lines, known = [], None
    for name, source, words, keys in parts:
        if known is not None and (shared := sum(key in known for key in keys)):
            words = [*words, f"{shared:,} are in the training rows, too"]
        known = set(keys) if known is None else known
        lines.append(f"{name}: {source}: {'; '.join(words)}")
    return "\n".join(lines)


def sizes(lengths: np.ndarray) -> str:
    """Returns how many examples there are, and of how many tokens.

    Args:
        lengths: Tokens of each, (n,), n >= 1.
    """
    return (
        f"{len(lengths):,} examples, {lengths.sum():,} tokens, "
        f"{lengths.mean():.1f} on average, {lengths.max()} at most"
    )
