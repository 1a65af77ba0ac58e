"""The cache against the whole forward pass; batches against one prompt alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.model.decode import empty_cache, extend
from experiments.model.generate import _decode, generate, generate_batch
from experiments.model.shape import LlamaConfig
from tests.experiments import llama_reference

CONFIG = LlamaConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)
pytestmark = pytest.mark.usefixtures("fast_compilation")
PROMPTS = [[3, 5, 7], [1], [2, 4, 6, 8, 10, 12, 14, 16, 18, 0, 1], [9, 9], [3, 5]]


@pytest.fixture(scope="module")
def params():
    return llama_reference.random_params(CONFIG)


@pytest.fixture(scope="module")
def alone(params):
    """The likeliest 12 tokens after each prompt."""
    return [generate(CONFIG, params, prompt, 12)[len(prompt) :] for prompt in PROMPTS]


def test_cached_logits_are_those_of_the_whole_pass_at_every_position(params):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 14))
    begin = np.array([0, 4, 1], np.int32)
    read = jax.jit(functools.partial(extend, CONFIG))
    cache = empty_cache(CONFIG, jnp.asarray(begin), 14)
    logits, cache = read(params, cache, tokens[:, :6])
    found = [logits]
    for place in range(6, 14):
        logits, cache = read(params, cache, tokens[:, place : place + 1])
        found.append(logits)

    assert int(cache.used) == 14
    for row, start in enumerate(begin):
        expected = llama_reference.forward(CONFIG, params, tokens[row, start:])
        # Logits are of size 1 here; a float32 sum of 24 products errs by some 1e-6.
        np.testing.assert_allclose(
            np.stack(found)[:, row], expected[5 - start :], atol=5e-6
        )


def test_a_batch_continues_each_prompt_as_if_it_were_alone(params, alone):
    found = generate_batch(CONFIG, params, PROMPTS, 12, [], batch_size=2)

    assert [new.dtype for new in found] == [np.int32] * 5
    for new, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(new, expected)


def test_a_continuation_ends_before_its_stop(params, alone):
    # A token that the third continuation has, and not as its first.
    stop = next(token for token in alone[2][1:] if token != alone[2][0])
    found = generate_batch(CONFIG, params, PROMPTS, 12, [stop], batch_size=2)

    assert 0 < len(found[2]) < 12
    for new, whole in zip(found, alone, strict=True):
        ends = [*np.flatnonzero(whole == stop), 12]
        np.testing.assert_array_equal(new, whole[: ends[0]])


def test_an_empty_batch_has_no_continuations(params):
    assert generate_batch(CONFIG, params, [], 12, [], batch_size=2) == []


def test_a_prompt_outside_the_vocabulary_is_an_error(params):
    with pytest.raises(UserError, match=r"prompt \[19\] must hold .* from 0 to 18"):
        generate_batch(CONFIG, params, [[1], [19]], 1, [], batch_size=2)


def test_prompts_and_limits_of_one_bucket_share_a_program(params):
    before = _decode._cache_size()
    for length, limit in ((3, 6), (5, 9), (16, 16)):
        assert len(generate(CONFIG, params, [1] * length, limit)) == length + limit

    assert _decode._cache_size() <= before + 1


def test_a_bfloat16_model_keeps_bfloat16_keys_and_values(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    cache = empty_cache(config, jnp.zeros(1, jnp.int32), 4)

    logits, cache = jax.eval_shape(
        functools.partial(extend, config), params, cache, jnp.ones((1, 3), jnp.int32)
    )

    assert (logits.shape, logits.dtype) == ((1, CONFIG.vocab_size), jnp.float32)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
