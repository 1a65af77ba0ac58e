import gzip
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.errors import UserError
from tests.experiments.llama_reference import SHARED_DATA

MISTRAL = SHARED_DATA / "tokenizer" / "mistral-v1.model"
C4 = SHARED_DATA / "c4" / "c4-validation.00000-of-00001.json.gz"
needs_shared_data = pytest.mark.skipif(
    not (MISTRAL.exists() and C4.exists()),
    reason="needs ../shared/data/tokenizer and ../shared/data/c4",
)
ODD_TEXTS = ["", " ", "  two  spaces ", "\n\ttab\r\n", "\0", "日本語 🎉", "e\u0301"]


def write_tokenizer_json(path, special="</s>"):
    """A byte-level tokenizer that would cut, pad and add an end to every text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(["low lower lowest slow slower"] * 9, trainer)
    model.enable_truncation(max_length=3)
    model.enable_padding(length=64)
    model.save(str(path))
    return str(path)


def write_sentencepiece_model(path, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["low lower lowest slow slower"] * 9),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return str(path)


@pytest.fixture(params=["bytes", "tokenizer.json", "sentencepiece"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "tokenizer.json":
        return load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json"))
    return load_tokenizer(write_sentencepiece_model(tmp_path / "small.model"))


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_returns_the_encoded_text(tokenizer, text):
    ids = tokenizer.encode(text)

    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_a_batch_is_encoded_like_its_texts(tokenizer):
    texts = [*ODD_TEXTS, "slow lower lowest " * 30]

    batch = tokenizer.encode_batch(texts)

    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.decode(batch[-1]) == texts[-1]


def test_ids_lie_in_the_vocabulary_and_none_ends_a_document(tokenizer):
    ids = tokenizer.encode("a </s> in the text, 日本語")

    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert 0 <= tokenizer.end_of_document < tokenizer.vocab_size
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a </s> in the text, 日本語"


def test_the_end_of_a_document_decodes_to_nothing(tokenizer):
    ids = [*tokenizer.encode("slow"), tokenizer.end_of_document]

    assert tokenizer.decode(ids) == "slow"


def test_bytes_are_utf8_and_the_end_follows_them():
    tokenizer = load_tokenizer("bytes")

    assert tokenizer.encode("hé").tolist() == [104, 195, 169]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([104, 195]) == "h\ufffd"


@needs_shared_data
def test_sentencepiece_is_lossless_on_c4():
    tokenizer = load_tokenizer(str(MISTRAL))
    with gzip.open(C4, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]

    batch = tokenizer.encode_batch(texts)

    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert tokenizer.vocab_size == 32_000
    assert tokenizer.end_of_document == 2
    assert sum(map(len, batch)) < 0.3 * sum(map(len, texts))


@needs_shared_data
def test_sentencepiece_drops_one_leading_space_of_a_part():
    tokenizer = load_tokenizer(str(MISTRAL))
    ids = tokenizer.encode("Once upon a time")

    assert tokenizer.decode(ids[2:]) == "a time"


@pytest.mark.parametrize("spec", ["gpt2", "", "tokenizer.bin", "byte"])
def test_an_unknown_specification_is_an_error_that_lists_the_kinds(spec):
    with pytest.raises(UserError, match=rf"{spec!r} is unknown; give 'bytes', a Sent"):
        load_tokenizer(spec)


@pytest.mark.parametrize("name", ["no.model", "no.json", "directory.model"])
def test_a_missing_file_is_an_error(tmp_path, name):
    (tmp_path / "directory.model").mkdir()

    with pytest.raises(UserError, match=rf"{name} is not a file; check the path"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.model", r"broken\.model is not a SentencePiece model"),
        ("broken.json", r"broken\.json is not a Hugging Face tokenizer"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff\xfe"])
def test_an_unreadable_model_is_an_error(tmp_path, name, message, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_a_model_without_an_end_of_document_is_an_error(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", special="<unusual>")
    with pytest.raises(UserError, match=r"no token that ends a document; add one of"):
        load_tokenizer(path)

    path = write_sentencepiece_model(tmp_path / "small.model", eos_id=-1)
    with pytest.raises(UserError, match=r"no end-of-sentence piece"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "eos", ["<unusual>", {"content": "<unusual>", "lstrip": False}]
)
def test_the_settings_beside_a_tokenizer_name_its_end(tmp_path, eos):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", special="<unusual>")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(path).end_of_document == 0
    settings.write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read"):
        load_tokenizer(path)


def every_byte_of_utf8():
    codes = [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)]
    text = "".join(map(chr, codes))
    assert set(text.encode()) == {*range(0xC0), *range(0xC2, 0xF5)}
    return text


def test_a_saved_tokenizer_loads_with_the_same_ids(tokenizer, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    loaded = load_tokenizer(str(saved))
    assert find_tokenizer(saved) in saved.iterdir()
    for name in ("vocab_size", "end_of_document", "beginning"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in [*ODD_TEXTS, "lower <|endoftext|> </s>", every_byte_of_utf8()]:
        ids = tokenizer.encode(text)
        np.testing.assert_array_equal(loaded.encode(text), ids)
        assert loaded.decode(ids) == tokenizer.decode(ids)


def test_a_saved_tokenizer_says_its_ends_and_adds_none(tokenizer, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    assert not settings["add_bos_token"]
    assert not settings["add_eos_token"]
    assert settings["eos_token"] in ("</s>", "<|endoftext|>")
    assert settings["bos_token"] in ("<s>", settings["eos_token"])
