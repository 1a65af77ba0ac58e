"""SentencePiece's models as tokenizers: a ``.model`` file, or a GGUF file's."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from experiments.data.chat import Chat
from experiments.data.gguf_reader import is_gguf
from experiments.data.gguf_tokenizer import read_gguf_sentencepiece
from experiments.data.tokenizer_settings import Settings, read_settings, write_settings
from experiments.errors import UserError


class SentencePieceTokenizer:
    """A SentencePiece model, or a GGUF file's; its end of sentence ends documents.

    With byte fallback and the identity normalizer, as in LLaMA's and Mistral's models,
    decoding returns the encoded text, but U+2581, SentencePiece's own mark for a space,
    returns as a space. Encoding puts such a mark before the text ("dummy prefix") and
    decoding removes one leading space, also where it decodes a part of a text.

    In a chat, words of control pieces are these pieces, and each text between two of
    them is encoded by itself, with a dummy prefix, as llama.cpp does and transformers'
    LlamaTokenizer in its ``legacy`` mode.
    """

    def __init__(self, path: Path):
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            if is_gguf(path):
                model, settings = read_gguf_sentencepiece(path)
            else:
                model, settings = path.read_bytes(), read_settings(path.parent)
            self._model.LoadFromSerializedProto(model)
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
        self.used_vocab_size = self.vocab_size
        self.end_of_document: int = self._model.eos_id()
        ends: list[int] = [self._model.bos_id(), self.end_of_document]
        self.beginning = next(piece for piece in ends if piece >= 0)
        words = self._model.id_to_piece(list(range(self.vocab_size)))
        pieces = {word: i for i, word in enumerate(words)}
        self._control = {k: i for k, i in pieces.items() if self._model.is_control(i)}
        _check_pieces(path, settings, pieces)
        end = pieces.get(settings.words.get("eos_token", ""), self.end_of_document)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys((end, self.end_of_document)))
        roles = {"bos_token": self.beginning, "eos_token": self.end_of_document}
        spelled = {role: words[i] for role, i in roles.items()}
        self._settings = Settings({**spelled, **settings.words}, settings.chat_template)
        self.chat: Chat | None = None
        if settings.chat_template is not None:
            self.chat = Chat(
                settings.chat_template, self._settings.words, end, self._encode_rendered
            )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        # A model may have more tokens than there are pieces, and write one of them.
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, directory: Path) -> None:
        """Writes a copy of the model as ``tokenizer.model``."""
        path = directory / "tokenizer.model"
        path.write_bytes(self._model.serialized_model_proto())
        write_settings(directory, self._settings)

    def _encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of texts in which words of control pieces are these."""
        words = sorted(self._control, key=len, reverse=True)
        # A pattern with a group keeps what it splits at.
        pattern = f"({'|'.join(map(re.escape, words))})"
        return [self._joined(filter(None, re.split(pattern, text))) for text in texts]

    def _joined(self, parts: Iterable[str]) -> np.ndarray:
        ids = []
        for part in parts:
            control = self._control.get(part)
            ids += self._model.encode(part) if control is None else [control]
        return np.array(ids, np.int32)


def _check_pieces(path: Path, settings: Settings, pieces: Collection[str]) -> None:
    """Raises UserError if a chat needs tokens that stand beside the model's pieces."""
    used = [word for word in settings.added if word in (settings.chat_template or "")]
    for word in (*filter(None, [settings.words.get("eos_token")]), *used):
        if word not in pieces:
            raise UserError(
                f"tokenizer: {path} has no piece {word!r}, which the files beside it "
                "add; give the tokenizer.json of the model, which has all tokens "
                "(transformers' AutoTokenizer writes it)"
            )
