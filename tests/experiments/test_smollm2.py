"""The packaged SmolLM2 against what transformers computes from the same file."""

import json

import jax
import numpy as np
import pytest

from experiments.data.tokenizers import load_tokenizer
from experiments.model.generate import generate_batch
from experiments.model.hugging_face import load_llama
from experiments.model.llama import apply
from experiments.tasks.answers import Exchange, Prompts, chat_of
from experiments.tasks.likelihood import likelihoods
from tests.experiments.references import smollm2

pytest.importorskip("gguf", reason="needs the package gguf")
STORED = json.loads(smollm2.STORED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def path(smollm2_path):
    return smollm2_path


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(str(path))


def test_texts_have_the_ids_of_transformers(tokenizer):
    texts = [*smollm2.TEXTS, *smollm2.DIGIT_TEXTS]
    expected = [*STORED["texts"], *STORED["digit_texts"]]

    found = tokenizer.encode_batch(texts)

    assert [ids.tolist() for ids in found] == expected
    assert [tokenizer.decode(ids) for ids in found] == texts


def test_conversations_are_rendered_as_by_transformers(tokenizer):
    found = [
        tokenizer.chat.render(messages, add_generation_prompt=is_asked)
        for messages in smollm2.CONVERSATIONS
        for is_asked in (False, True)
    ]

    assert found == [text for pair in STORED["rendered"] for text in pair]
    ids = tokenizer.chat.encode_batch(found)
    assert [x.tolist() for x in ids] == STORED["chat_ids"]


def test_a_question_is_the_users_message(tokenizer):
    prompts = Prompts("gsm8k", tokenizer, chat_of(tokenizer, "auto"))
    (pair,) = prompts.encode([Exchange("What is 1 + 1?", "2")])

    asked = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (prompt,) = tokenizer.chat.encode_batch([asked])
    assert pair.prompt.tolist() == prompt.tolist()
    # The line end that the template writes behind the end is not learned.
    end = tokenizer.chat.end
    assert pair.answer.tolist() == [*tokenizer.encode("2"), end]
    assert set(prompts.stop_ids) == {end, tokenizer.end_of_document}


@pytest.fixture(scope="module")
def model(path):
    return load_llama(path)


@pytest.mark.slow
def test_choices_are_as_likely_as_transformers_finds_them(model, tokenizer):
    texts = [(smollm2.ASKED, choice) for choice in smollm2.CHOICES]
    pairs = Prompts("commonsense", tokenizer).encode_plain(texts)
    config, params = model
    sums = likelihoods(config, params, pairs, batch_size=len(pairs)).sums

    # Logits of size 10, of 30 layers in float32, and up to 4 tokens of them.
    np.testing.assert_allclose(sums, STORED["likelihoods"], atol=4e-3)
    assert np.argmax(sums) == 0


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(model, tokenizer):
    config, params = model
    stored = STORED["continuations"]
    prompts = [tokenizer.encode(prompt) for prompt in smollm2.PROMPTS]
    assert [ids.tolist() for ids in prompts] == [x["prompt"] for x in stored]

    found = generate_batch(
        config, params, prompts, smollm2.NEW_TOKENS, (), batch_size=len(prompts)
    )

    assert [ids.tolist() for ids in found] == [x["tokens"] for x in stored]
    whole = np.concatenate([prompts[0], found[0][:-1]])[None]
    logits = jax.jit(apply, static_argnums=0)(config, params, whole)[0, -1, :8]
    # Logits of size 10, of 30 layers in float32.
    np.testing.assert_allclose(logits, stored[0]["last_logits"], atol=2e-3)
    assert "The moon rises in the west, and the stars" in tokenizer.decode(found[0])
