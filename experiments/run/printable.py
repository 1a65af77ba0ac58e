"""Text that a model makes up, as a terminal may show it."""

from collections.abc import Iterable

from experiments.data.tokenizers import Tokenizer


def continuation(tokenizer: Tokenizer, tokens: Iterable[int], start: int) -> str:
    """Returns the text of ``tokens[start:]``, as it follows the tokens before."""
    # A model may have more tokens than its tokenizer, to fill up its last shard.
    known = [token for token in tokens if token < tokenizer.vocab_size]
    whole, before = tokenizer.decode(known), tokenizer.decode(known[:start])
    # SentencePiece drops a space where a text begins.
    is_apart = whole.startswith(before)
    return printable(
        whole[len(before) :] if is_apart else tokenizer.decode(known[start:])
    )


def printable(text: str) -> str:
    """Returns a text with signs in the place of what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
