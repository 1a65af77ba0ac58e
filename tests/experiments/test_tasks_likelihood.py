import numpy as np
import pytest

from experiments.model.hugging_face import load_llama
from experiments.model.shape import LlamaConfig
from experiments.tasks import likelihood
from experiments.tasks.answers import Pair
from experiments.tasks.likelihood import likelihoods
from tests.experiments import llama_reference

CONFIG = LlamaConfig(
    vocab_size=19,
    hidden_size=32,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)


def pairs_of(*sizes):
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(0, CONFIG.vocab_size, n) for n in size] for size in sizes]
    return [Pair(*(ids.astype(np.int32) for ids in pair)) for pair in drawn]


def by_hand(config, params, pair):
    """Sum and hits of one answer, from a full float64 softmax."""
    tokens = np.concatenate(pair)
    logits = llama_reference.forward(config, params, tokens[:-1])[
        len(pair.prompt) - 1 :
    ]
    largest = logits.max(axis=1, keepdims=True)
    log_probs = logits - largest
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    chosen = log_probs[np.arange(len(pair.answer)), pair.answer]
    return chosen.sum(), (logits.argmax(axis=1) == pair.answer).sum()


@pytest.fixture(scope="module")
def params(fast_compilation):
    del fast_compilation
    return llama_reference.random_params(CONFIG)


def test_sums_and_hits_are_those_of_a_full_softmax(params):
    # Out of order of length, in three batches, the last one filled up.
    pairs = pairs_of((6, 3), (1, 1), (2, 5), (4, 1), (3, 3))
    # One answer of likeliest tokens, as greedy decoding gives it.
    logits = llama_reference.forward(CONFIG, params, pairs[3].prompt)
    pairs[3] = Pair(pairs[3].prompt, logits[-1:].argmax(axis=1).astype(np.int32))
    found = likelihoods(CONFIG, params, pairs, batch_size=2)

    sums, hits = zip(*(by_hand(CONFIG, params, pair) for pair in pairs), strict=True)
    # float32 logits of about 5 against float64.
    np.testing.assert_allclose(found.sums, sums, rtol=1e-5)
    assert found.hits.tolist() == [*hits]
    assert found.hits[3] == 1


def test_batches_have_at_most_four_shapes(monkeypatch):
    pairs = pairs_of(*((n, 2) for n in range(1, 64)))
    shapes = []

    def score(config, params, batch):
        shapes.append(batch["inputs"].shape)
        return np.zeros(2), np.zeros(2)

    monkeypatch.setattr(likelihood, "_score", score)
    likelihoods(CONFIG, {}, pairs, batch_size=2)

    assert len(shapes) == 32
    assert len(set(shapes)) <= 4


@pytest.mark.usefixtures("fast_compilation")
def test_a_trained_model_finds_its_own_story_likely(shared_data):
    config, params = load_llama(shared_data / "stories260K")
    # "Once upon a time, there was a little girl named Lily."
    story = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
    other = story[:3] + story[3:][::-1]
    pairs = [
        Pair(np.array([1, *ids[:3]], np.int32), np.array(ids[3:], np.int32))
        for ids in (story, other)
    ]
    found = likelihoods(config, params, pairs, batch_size=2)

    wanted = [by_hand(config, params, pair) for pair in pairs]
    np.testing.assert_allclose(found.sums, [total for total, _ in wanted], rtol=1e-4)
    assert found.hits[0] == len(pairs[0].answer)
    assert found.sums[0] - found.sums[1] > 50
