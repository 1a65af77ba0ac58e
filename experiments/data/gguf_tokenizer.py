"""A GGUF file's tokenizer: byte-level BPE ("gpt2"), or SentencePiece's ("llama")."""

import importlib
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from experiments.data.gguf_reader import GgufFile, open_gguf
from experiments.data.tokenizer_settings import Settings
from experiments.errors import UserError

_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What a token is: llama.cpp's numbers.
_CONTROL, _USER_DEFINED = 3, 4

# LLaMA 3's own tokenizer.json has this expression.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_sentencepiece(path: Path) -> bool:
    """Returns which of the two tokenizers the file has.

    Raises:
        UserError: If the file cannot be read, has no tokenizer, or one of another kind.
    """
    kind = open_gguf(path).field("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path}: its tokenizer is of the kind {kind!r}, and only 'gpt2', "
            "byte-level BPE, and 'llama', SentencePiece, are supported; take the "
            "model in Hugging Face's layout, or its tokenizer.json by --tokenizer in "
            "pre-training"
        )
    return kind == "llama"


def read_gguf_sentencepiece(path: Path) -> tuple[bytes, Settings]:
    """Returns SentencePiece's model, serialized, and what :func:`read_gguf_bpe` does.

    Raises:
        UserError: If the file cannot be read, or lacks a field.
    """
    file = open_gguf(path)
    model = importlib.import_module(
        "sentencepiece.sentencepiece_model_pb2"
    ).ModelProto()
    words = file.field("tokenizer.ggml.tokens", list)
    scores = file.field("tokenizer.ggml.scores", list)
    types = file.field("tokenizer.ggml.token_type", list)
    # Some files say that these are words of the user's.
    ends = {file.fields.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos")}
    for i, (word, score, type_) in enumerate(zip(words, scores, types, strict=False)):
        # llama.cpp took over SentencePiece's numbers of types.
        model.pieces.add(piece=word, score=score, type=_CONTROL if i in ends else type_)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = True
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
        found = file.field(f"tokenizer.ggml.{name}_token_id", int, -1)
        setattr(trainer, f"{role}_id", found)
        if found in range(len(words)):
            setattr(trainer, f"{role}_piece", words[found])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    prefix = file.field("tokenizer.ggml.add_space_prefix", bool, True)
    normalizer.add_dummy_prefix = prefix
    return model.SerializeToString(), _settings(file, words)


def read_gguf_bpe(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Returns the byte-level tokenizer, and its special tokens and chat template.

    Raises:
        UserError: If the file cannot be read, lacks a field, or splits text in an
            unknown way.
    """
    file = open_gguf(path)
    splits = {"smollm": _digits_apart, "gpt-2": _gpt_2, "llama-bpe": _llama_3}
    split = file.field("tokenizer.ggml.pre", str, "default")
    if split not in splits:
        raise UserError(
            f"{path}: its tokenizer splits text as {split!r}, and only "
            f"{', '.join(splits)} are supported; take the model in Hugging "
            "Face's layout, or its tokenizer.json by --tokenizer in pre-training"
        )
    words = file.field("tokenizer.ggml.tokens", list)
    model = tokenizers.Tokenizer(_bpe(file, words, ignore_merges=split == "llama-bpe"))
    model.pre_tokenizer = splits[split]()
    model.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type", list, [])
    for word, type_ in zip(words, types, strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            token = AddedToken(word, normalized=False, special=type_ == _CONTROL)
            model.add_tokens([token])
    return model, _settings(file, words)


def _settings(file: GgufFile, words: list[str]) -> Settings:
    ids = {role: file.fields.get(f"tokenizer.ggml.{x}") for role, x in _ROLES.items()}
    named = {
        role: words[i]
        for role, i in ids.items()
        if i is not None and i in range(len(words))
    }
    return Settings(named, file.field("tokenizer.chat_template", str, None))


def _bpe(file: GgufFile, words: list[str], *, ignore_merges: bool) -> models.BPE:
    merges = [x.split(" ") for x in file.field("tokenizer.ggml.merges", list)]
    vocabulary = {word: i for i, word in enumerate(words)}
    try:
        return models.BPE(
            vocabulary, [(a, b) for a, b in merges], ignore_merges=ignore_merges
        )
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"{file.path}: its tokens make no tokenizer ({error}); convert it anew"
        ) from error


def _gpt_2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_apart():
    """SmolLM's: a digit is by itself; the text between digits is split as GPT-2's."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt_2()])


def _llama_3():
    split = pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, spelled])
