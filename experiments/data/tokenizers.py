"""Tokenizers behind one interface: bytes, SentencePiece, Hugging Face.

No tokenizer adds special tokens when it encodes, and text that spells a special token
is encoded as text. ``end_of_document`` decodes to nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from experiments.errors import UserError

# tokenizer.json does not say which token ends a document; the names in general use.
_END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


class Tokenizer(Protocol):
    """What data, training and generation need of a tokenizer.

    Texts must be encodable as UTF-8: a lone surrogate, which JSON can spell, is an
    error of the underlying library.

    Attributes:
        name: For people, e.g. in a table.
        vocab_size: Every id is in [0, vocab_size).
        end_of_document: The id that separates documents; never produced by ``encode``.
    """

    name: str
    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, (n,) int32."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, (n_i,) int32."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of a sequence of ids, each in [0, vocab_size)."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer that a command line names.

    Args:
        spec: "bytes", or the path of a SentencePiece ``.model`` or of a Hugging Face
            ``tokenizer.json``.

    Returns:
        The tokenizer.

    Raises:
        UserError: If the specification is neither, or the file is missing, unreadable
            or without a token that ends a document.

    Example:
        >>> load_tokenizer("bytes").encode("hé")
        array([104, 195, 169], dtype=int32)
    """
    if spec == "bytes":
        return ByteTokenizer()
    kinds = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    path = Path(spec)
    if path.suffix not in kinds:
        raise UserError(
            f"tokenizer: {spec!r} is unknown; give 'bytes', a SentencePiece .model "
            "or a Hugging Face tokenizer.json"
        )
    if not path.is_file():
        raise UserError(f"tokenizer: {spec} is not a file; check the path")
    return kinds[path.suffix](path)


class ByteTokenizer:
    """The 256 bytes of UTF-8, lossless, and 256 as the end of a document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        kept = bytes(int(i) for i in ids if i != self.end_of_document)
        return kept.decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model; documents end with its end-of-sentence piece.

    With byte fallback and the identity normalizer, as in LLaMA's and Mistral's models,
    decoding returns the encoded text, but U+2581, SentencePiece's own mark for a space,
    returns as a space. Encoding puts such a mark before the text ("dummy prefix") and
    decoding removes one leading space, also where it decodes a part of a text.
    """

    def __init__(self, path: Path):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"tokenizer: {path} is not a SentencePiece model ({error}); "
                "download it again"
            ) from error
        if self._model.eos_id() < 0:
            raise UserError(
                f"tokenizer: {path} has no end-of-sentence piece; "
                "train the model with one (eos_id)"
            )
        self.name = path.name
        self.vocab_size: int = self._model.vocab_size()
        self.end_of_document: int = self._model.eos_id()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; its own cutting and padding are switched off.

    Whether decoding returns the encoded text depends on the file: byte-level models do.
    """

    def __init__(self, path: Path):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"tokenizer: {path} is not a Hugging Face tokenizer ({error}); "
                "download it again"
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab()
        ends = [vocabulary[name] for name in _END_OF_DOCUMENT if name in vocabulary]
        if not ends:
            raise UserError(
                f"tokenizer: {path} has no token that ends a document; "
                f"add one of {' '.join(_END_OF_DOCUMENT)}"
            )
        self.name = path.name
        # Ids may have gaps, so the count of the tokens would be too small.
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = ends[0]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return self._model.decode(kept, skip_special_tokens=False)
