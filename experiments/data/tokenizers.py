"""Tokenizers behind one interface: bytes, SentencePiece, Hugging Face, GGUF.

No tokenizer adds special tokens when it encodes, and text that spells a special token
is encoded as text. ``end_of_document`` decodes to nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments.data.chat import Chat
from experiments.data.gguf_reader import is_gguf
from experiments.data.gguf_tokenizer import is_sentencepiece, read_gguf_bpe
from experiments.data.sentencepiece_tokenizer import SentencePieceTokenizer
from experiments.data.tokenizer_settings import Settings, read_settings, write_settings
from experiments.errors import UserError

# tokenizer.json does not say which token ends a document; the names in general use.
_END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_BYTES_END = "<|endoftext|>"
_BEGINNING = ("<s>", "<|begin_of_text|>", "<bos>")
# What a tokenizer's file is called beside weights, the preferred one first.
_BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer.model")


class Tokenizer(Protocol):
    """What data, training and generation need of a tokenizer.

    Texts must be encodable as UTF-8: a lone surrogate, which JSON can spell, is an
    error of the underlying library.

    Attributes:
        name: For people, e.g. in a table.
        vocab_size: Every id is in [0, vocab_size).
        used_vocab_size: Every id of a text, of its beginning and of its end is in
            [0, used_vocab_size): what a model needs. A token beyond, such as a padding
            that was added to the file and not to the model, can stand in a chat alone.
        end_of_document: The id that separates documents; never produced by ``encode``.
        beginning: The id that stands for the beginning of a text; that of the end of a
            document, which stands before the next one, where there is no other. No
            training text has another.
        ends: The ids that a trained model may end a text or an answer with; the first
            one is that which the files beside the tokenizer name, if they do.
        chat: The model's chat template; None: its files have none.
    """

    name: str
    vocab_size: int
    used_vocab_size: int
    end_of_document: int
    beginning: int
    ends: tuple[int, ...]
    chat: Chat | None

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, (n,) int32."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, (n_i,) int32."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of a sequence of ids, each in [0, vocab_size)."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the files that Hugging Face's ``AutoTokenizer`` reads."""
        ...


def find_tokenizer(directory: Path) -> Path | None:
    """Returns the tokenizer's file beside the weights in a directory, None: none.

    A GGUF file holds both.
    """
    if is_gguf(directory):
        return directory
    files = (directory / name for name in _BESIDE_WEIGHTS)
    return next(filter(Path.is_file, files), None)


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer that a command line names.

    Args:
        spec: "bytes", or the path of a SentencePiece ``.model``, of a Hugging Face
            ``tokenizer.json``, of a directory with one, or of a ``.gguf`` file.

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
    kinds = {
        ".model": SentencePieceTokenizer,
        ".json": HuggingFaceTokenizer,
        ".gguf": HuggingFaceTokenizer,
    }
    path = find_tokenizer(Path(spec)) or Path(spec)
    if path.suffix not in kinds:
        raise UserError(
            f"tokenizer: {spec!r} is unknown; give 'bytes', a SentencePiece "
            ".model, a Hugging Face tokenizer.json or a .gguf file"
        )
    if not path.is_file():
        raise UserError(f"tokenizer: {spec} is not a file; check the path")
    if is_gguf(path) and is_sentencepiece(path):
        return SentencePieceTokenizer(path)
    return kinds[path.suffix](path)


class ByteTokenizer:
    """The 256 bytes of UTF-8, lossless, and 256 as the end of a document."""

    name = "bytes"
    vocab_size = used_vocab_size = 257
    end_of_document = 256
    beginning = 256
    ends: tuple[int, ...] = (256,)
    chat: Chat | None = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        # A model may have more tokens than these, and write one of them.
        kept = bytes(int(i) for i in ids if i < self.end_of_document)
        return kept.decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """Writes the same ids as a byte-level ``tokenizer.json``."""
        spelled = dict(zip(_byte_letters(), range(256), strict=True))
        model = tokenizers.Tokenizer(models.BPE(vocab=spelled, merges=[]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens([_BYTES_END])
        model.save(str(directory / "tokenizer.json"))
        ends = {"bos_token": _BYTES_END, "eos_token": _BYTES_END}
        write_settings(directory, Settings(ends))


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, or a GGUF file's tokens.

    A file's own cutting and padding are switched off. Whether decoding returns the
    encoded text depends on the file: byte-level models do.
    """

    def __init__(self, path: Path):
        if is_gguf(path):
            self._model, settings = read_gguf_bpe(path)
            self._content = self._model.to_str().encode()
        else:
            self._model, self._content = _read_tokenizer_json(path)
            settings = read_settings(path.parent)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab()
        named = settings.words.get("eos_token")
        names = [*_END_OF_DOCUMENT, named]
        ends = [vocabulary[name] for name in names if name in vocabulary]
        if not ends:
            raise UserError(
                f"tokenizer: {path} has no token that ends a document; add one of "
                f"{' '.join(_END_OF_DOCUMENT)}, or eos_token in tokenizer_config.json"
            )
        self.name = path.name
        # Ids may have gaps, so the count of the tokens would be too small.
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = ends[0]
        beginnings = [vocabulary[name] for name in _BEGINNING if name in vocabulary]
        self.beginning = [*beginnings, self.end_of_document][0]
        end = vocabulary.get(named or "", self.end_of_document)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys((end, self.end_of_document)))
        roles = {"bos_token": self.beginning, "eos_token": self.end_of_document}
        spelled = {role: self._model.id_to_token(i) or "" for role, i in roles.items()}
        words = {**spelled, **settings.words}
        self._settings = Settings(words, settings.chat_template)
        kept = self._model.get_vocab(with_added_tokens=False).values()
        added = self._model.get_added_tokens_decoder().items()
        in_texts = [i for i, token in added if not token.special]
        self.used_vocab_size = 1 + max(*kept, *in_texts, self.beginning, *self.ends)
        self.chat: Chat | None = None
        if settings.chat_template is not None:
            self.chat = Chat(settings.chat_template, words, end, self._encode_rendered)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return self._model.decode(kept, skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Writes a copy of the file as ``tokenizer.json``."""
        (directory / "tokenizer.json").write_bytes(self._content)
        write_settings(directory, self._settings)

    def _encode_rendered(self, texts):
        """Returns the ids of texts in which words of special tokens are these."""
        self._model.encode_special_tokens = False
        try:
            return self.encode_batch(texts)
        finally:
            self._model.encode_special_tokens = True


def _read_tokenizer_json(path):
    try:
        content = path.read_bytes()
        return tokenizers.Tokenizer.from_buffer(content), content
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"tokenizer: {path} is not a Hugging Face tokenizer ({error}); "
            "download it again"
        ) from error


def _byte_letters():
    """Yields the letter that stands for each byte in byte-level vocabularies.

    GPT-2's: a byte that Latin-1 prints stands for itself, the n-th other one for the
    letter 256 + n.
    """
    others = iter(range(256, 512))
    for byte in range(256):
        prints = 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)
        yield chr(byte if prints else next(others))
