"""Tokenizers from small GGUF files, and the files that are refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from experiments import export, generate
from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.errors import UserError
from tests.experiments.test_tokenizers import ODD_TEXTS, write_sentencepiece_model

small_gguf = pytest.importorskip("tests.experiments.small_gguf", reason="needs gguf")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
# They cross every border that a split may draw.
MERGES = [
    *("1 2", "12 3", "123 4", "Ġ 12", "Ċ Ċ", "ĊĊ 1"),
    *("d o", "do n", "' t", "don 't", "w e", "' l", "'l l", "we 'll"),
    *("W E", "' L", "'L L", "L L", "WE 'LL"),
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = [*CONTROL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(WORDS) - 3),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.gguf"


def load(path, changes=None):
    """The tokenizer of a file whose fields are FIELDS, but for the changes."""
    changes = {f"tokenizer.{name}": value for name, value in (changes or {}).items()}
    small_gguf.write(path, {}, **(FIELDS | changes))
    return load_tokenizer(str(path))


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("split", "text", "expected"),
    [
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "1234", ["1234"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("smollm", " 12", [" ", "1", "2"]),
        ("gpt-2", " 12", [" 12"]),
        ("llama-bpe", " 12", [" ", "12"]),
        # Two line ends before a digit are one piece where digits are apart.
        ("smollm", "\n\n1", ["\n\n", "1"]),
        ("gpt-2", "\n\n1", ["\n", "\n", "1"]),
        ("smollm", "don't", ["don", "'t"]),
        ("gpt-2", "we'll", ["we", "'ll"]),
        ("llama-bpe", "don't", ["don", "'t"]),
        # LLaMA 3 splits contractions in capitals too.
        ("llama-bpe", "WE'LL", ["WE", "'LL"]),
        ("gpt-2", "WE'LL", ["WE", "'", "LL"]),
        ("smollm", "日 é", ["\ufffd"] * 3 + [" "] + ["\ufffd"] * 2),
    ],
)
def test_text_is_split_as_the_file_names_it(path, split, text, expected):
    assert pieces(load(path, {"ggml.pre": split}), text) == expected


def test_a_gguf_file_holds_its_tokenizer(path):
    tokenizer = load(path)

    assert find_tokenizer(path) == path
    assert (tokenizer.name, tokenizer.vocab_size) == ("m.gguf", len(WORDS))
    # Documents end, and begin, with the word in general use, answers as the file says.
    assert (tokenizer.end_of_document, tokenizer.beginning) == (0, 0)
    assert tokenizer.ends == (2, 0)
    text = "  naïve\n\n\t日本語 🎉 1234 we'll"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_spelled_in_rendered_text_alone(path):
    tokenizer = load(path)
    text = "<|im_end|>"

    assert tokenizer.chat.encode_batch([text])[0].tolist() == [2]
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_of_the_user_is_found_in_any_text(path):
    types = [3] * 3 + [1] * (len(WORDS) - 4) + [4]
    tokenizer = load(path, {"ggml.token_type": types})

    # Its last piece, WE'LL, would be split.
    assert tokenizer.encode("WE'LL").tolist() == [len(WORDS) - 1]


def test_a_chat_template_of_the_file_knows_its_special_tokens(path):
    tokenizer = load(path)
    text = tokenizer.chat.render(
        [{"role": "user", "content": "we"}], add_generation_prompt=False
    )

    assert tokenizer.chat.end == 2
    assert text == "<|im_start|>we<|im_end|>"
    assert load(path, {"chat_template": None}).chat is None


def test_a_saved_tokenizer_is_the_one_of_the_file(path, tmp_path):
    tokenizer = load(path)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    loaded = load_tokenizer(str(saved))

    for name in ("vocab_size", "end_of_document", "beginning", "ends"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in ("don't 1234\n\n1 <|im_end|> 日本語", "<|im_start|>"):
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
        encoded = [x.chat.encode_batch([text])[0] for x in (loaded, tokenizer)]
        np.testing.assert_array_equal(*encoded)
    messages = [{"role": "user", "content": "we"}]
    for ending in (False, True):
        rendered = loaded.chat.render(messages, add_generation_prompt=ending)
        assert rendered == tokenizer.chat.render(messages, add_generation_prompt=ending)


@pytest.mark.usefixtures("fast_compilation")
def test_a_file_is_continued_as_the_directory_that_it_is_exported_to(
    path, tmp_path, capsys
):
    config = dataclasses.replace(small_gguf.CONFIG, vocab_size=len(WORDS))
    sizes = {"llama.vocab_size": len(WORDS)}
    small_gguf.write(path, small_gguf.random_tensors(config), **FIELDS, **sizes)

    assert export.main([str(path), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    texts = []
    for source in (path, tmp_path / "out"):
        words = ["--prompt", "don't 12", "--tokens", "9", "--seed", "3"]
        assert generate.main([str(source), *words]) == 0
        texts.append(capsys.readouterr().out)

    assert texts[0].startswith("don't 12")
    assert texts[0] == texts[1]
    ends = json.loads((tmp_path / "out/config.json").read_text())
    assert (ends["bos_token_id"], ends["eos_token_id"]) == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ggml.model": "bert"},
            "is of the kind 'bert', and only 'gpt2'.*--tokenizer",
        ),
        ({"ggml.model": None}, "the field tokenizer.ggml.model is missing"),
        (
            {"ggml.pre": "qwen2"},
            "splits text as 'qwen2', and only smollm, gpt-2, llama",
        ),
        ({"ggml.pre": None}, "splits text as 'default', and only .*by --tokenizer"),
        ({"ggml.tokens": "abc"}, "ggml.tokens is abc; it must be of type list"),
        ({"ggml.merges": ["1 2", "12"]}, "its tokens make no tokenizer"),
        ({"ggml.merges": ["1 5"]}, "its tokens make no tokenizer .*15"),
    ],
)
def test_tokenizers_of_other_kinds_are_errors(path, changes, message):
    with pytest.raises(UserError, match=rf"m\.gguf: .*{message}"):
        load(path, changes)


def test_a_sentencepiece_model_has_the_same_ids_from_a_gguf_file(path, tmp_path):
    file = write_sentencepiece_model(tmp_path / "small.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(Path(file).read_bytes())
    pieces = model.pieces
    fields = {
        "model": "llama",
        "tokens": [piece.piece for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.type for piece in pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    small_gguf.write(path, {}, **{f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    found, expected = load_tokenizer(str(path)), load_tokenizer(file)

    for name in ("vocab_size", "end_of_document", "beginning", "ends"):
        assert getattr(found, name) == getattr(expected, name)
    for text in [*ODD_TEXTS, "slow  lower </s> <unk> 123"]:
        np.testing.assert_array_equal(found.encode(text), expected.encode(text))
        assert found.decode(found.encode(text)) == text
    assert found.chat is expected.chat is None
    # Without the mark of a space before the text.
    fields["add_space_prefix"] = False
    small_gguf.write(path, {}, **{f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    bare = load_tokenizer(str(path))
    np.testing.assert_array_equal(bare.encode(" low"), found.encode("low"))


def test_a_sentencepiece_model_has_the_chat_template_of_its_file(path, tmp_path):
    template = "{{ bos_token }}low {{ messages[0].content }}{{ eos_token }}\n."
    file = Path(write_sentencepiece_model(tmp_path / "tokenizer.model"))
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": [piece.piece for piece in model.pieces],
        "ggml.scores": [piece.score for piece in model.pieces],
        "ggml.token_type": [piece.type for piece in model.pieces],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "chat_template": template,
    }
    small_gguf.write(path, {}, **{f"tokenizer.{k}": v for k, v in fields.items()})
    words = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    whole = load_tokenizer(str(file))
    for tokenizer in (load_tokenizer(str(path)), whole):
        chat = tokenizer.chat
        text = chat.render(
            [{"role": "user", "content": "slow"}], add_generation_prompt=False
        )
        assert text == "<s>low slow</s>\n."
        (ids,) = chat.encode_batch([text])
        between = [*tokenizer.encode("low slow"), 2, *tokenizer.encode("\n.")]
        np.testing.assert_array_equal(ids, [1, *between])
        # Text of a document spells its words, as before.
        assert 2 not in tokenizer.encode(text)
        assert (chat.end, tokenizer.ends) == (2, (2,))
    (tmp_path / "copy").mkdir()
    whole.save(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy" / "tokenizer.model"))
    np.testing.assert_array_equal(again.chat.encode_batch([text])[0], ids)


def test_the_answers_end_is_a_piece_that_the_settings_name(tmp_path):
    options = {"user_defined_symbols": ["<end>"]}
    file = write_sentencepiece_model(tmp_path / "tokenizer.model", **options)
    settings = {"eos_token": "<end>", "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(file)
    assert tokenizer.ends == (tokenizer.chat.end, tokenizer.end_of_document) == (3, 2)


@pytest.mark.parametrize("place", ["eos_token", "added_tokens.json", "decoder"])
def test_tokens_beside_the_pieces_that_a_chat_needs_are_refused(place, tmp_path):
    file = write_sentencepiece_model(tmp_path / "tokenizer.model")
    settings = {"chat_template": "<|turn|>{{ messages[0].content }}"}
    if place == "eos_token":
        settings["eos_token"] = "<|turn|>"
    elif place == "decoder":
        settings["added_tokens_decoder"] = {"400": {"content": "<|turn|>"}}
    else:
        (tmp_path / place).write_text(json.dumps({"<|turn|>": 400}))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"has no piece '<\|turn\|>', which the files"):
        load_tokenizer(file)
    # A token that nothing uses, such as one for padding, does no harm.
    path.write_text(json.dumps({"added_tokens_decoder": {"400": {"content": "<pad>"}}}))
    (tmp_path / "added_tokens.json").unlink(missing_ok=True)
    assert load_tokenizer(file).chat is None


def test_the_end_of_a_gguf_file_may_be_a_word_of_the_users(path, tmp_path):
    file = Path(write_sentencepiece_model(tmp_path / "tokenizer.model"))
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    types = [4 if i == 2 else piece.type for i, piece in enumerate(model.pieces)]
    fields = {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    small_gguf.write(path, {}, **{f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    assert load_tokenizer(str(path)).end_of_document == 2


def test_tokens_that_a_model_has_beside_its_tokenizers_are_nothing(tmp_path):
    file = write_sentencepiece_model(tmp_path / "tokenizer.model")
    for tokenizer in (load_tokenizer(file), load_tokenizer("bytes")):
        ids = [*tokenizer.encode("low"), tokenizer.vocab_size, tokenizer.vocab_size + 9]
        assert tokenizer.decode(ids) == "low"
