import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.errors import UserError
from experiments.model.hugging_face import load_llama
from experiments.model.llama import Llama, apply, init_params, rotation_of
from experiments.model.shape import MODELS, LlamaConfig, preset
from tests.experiments import llama_reference

SMALL = LlamaConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    rms_norm_eps=1e-3,
    rope_theta=50.0,
)
needs_stories = pytest.mark.skipif(
    not llama_reference.STORIES.exists(),
    reason="needs the trained model ../shared/data/stories260K",
)


logits_of = jax.jit(apply, static_argnums=0)


def random_tokens(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def assert_logits_close(actual, expected, tolerance):
    """Relative to the largest logit, as rounding errors add up over the sums."""
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


def mean_nll(config, params, tokens):
    logits = logits_of(config, params, tokens[:, :-1])
    nll = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(nll, tokens[:, 1:, None], -1))


@pytest.mark.parametrize(
    ("num_kv_heads", "tie_embeddings"), [(1, False), (2, True), (4, False)]
)
def test_logits_equal_the_float64_reference(num_kv_heads, tie_embeddings):
    config = dataclasses.replace(
        SMALL, num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings
    )
    params = llama_reference.random_params(config)
    tokens = random_tokens(config, (2, 9))

    logits = logits_of(config, params, tokens)

    assert logits.shape == (2, 9, config.vocab_size)
    for i in range(2):
        expected = llama_reference.forward(config, params, tokens[i])
        # float32 rounds at 6e-8; three layers of sums over 24 lose two digits at most.
        assert_logits_close(logits[i], expected, 5e-6)


@needs_stories
def test_logits_of_a_trained_model_equal_the_float64_reference():
    config, params = load_llama(llama_reference.STORIES)
    tokens = random_tokens(config, (1, 24))

    logits = logits_of(config, params, tokens)

    expected = llama_reference.forward(config, params, tokens[0])
    assert_logits_close(logits[0], expected, 5e-6)


def test_scanned_blocks_equal_the_blocks_one_after_the_other():
    params = llama_reference.random_params(SMALL)
    tokens = random_tokens(SMALL, (2, 9))
    blocks = nnx.eval_shape(lambda: Llama(SMALL, rngs=nnx.Rngs(0))).blocks
    graph, rotation = nnx.graphdef(blocks), rotation_of(SMALL, jnp.arange(9))
    run = jax.jit(lambda layer, hidden: nnx.merge(graph, layer)(hidden, rotation)[0])
    hidden = params["embedding"][tokens]
    for i in range(SMALL.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        hidden = run(layer, hidden)
    mean_square = jnp.mean(hidden**2, axis=-1, keepdims=True)
    normed = hidden / jnp.sqrt(mean_square + SMALL.rms_norm_eps) * params["norm"]

    expected = np.asarray(normed @ params["head"])
    assert_logits_close(logits_of(SMALL, params, tokens), expected, 1e-6)


@pytest.fixture(scope="module")
def gradients():
    """Compiled gradients of the mean nll, without and with rematerialization."""
    params = llama_reference.random_params(SMALL)
    tokens = random_tokens(SMALL, (2, 17))
    step = jax.jit(jax.grad(mean_nll, 1), static_argnums=0)
    compiled = [
        step.lower(dataclasses.replace(SMALL, remat=remat), params, tokens).compile()
        for remat in (False, True)
    ]
    return compiled, params, tokens


def test_rematerialization_changes_no_gradient(gradients):
    compiled, params, tokens = gradients
    kept, recomputed = (jax.tree.leaves(step(params, tokens)) for step in compiled)

    for expected, actual in zip(kept, recomputed, strict=True):
        # XLA may order the recomputed sums otherwise: float32 rounding, no more.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
        assert np.abs(expected).max() > 1e-3


def test_rematerialization_needs_less_memory(gradients):
    plain, remat = (step.memory_analysis().temp_size_in_bytes for step in gradients[0])

    assert remat < 0.8 * plain


def test_gradients_equal_finite_differences_of_the_reference(gradients):
    (step, _), params, tokens = gradients
    direction = llama_reference.random_params(SMALL, seed=1)
    grads = step(params, tokens)
    slope = sum(
        np.vdot(grad, along)
        for grad, along in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )

    def reference_nll(distance):
        moved = jax.tree.map(
            lambda p, d: np.asarray(p, np.float64) + distance * np.asarray(d),
            params,
            direction,
        )
        return np.mean([llama_reference.mean_nll(SMALL, moved, row) for row in tokens])

    # Central differences in float64 err by about 1e-8 here; the rest is float32.
    expected = (reference_nll(1e-5) - reference_nll(-1e-5)) / 2e-5
    assert slope == pytest.approx(expected, rel=1e-4)


def test_bfloat16_compute_is_close_and_gives_float32_logits():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    params = llama_reference.random_params(config)
    tokens = random_tokens(config, (2, 9))

    logits = logits_of(config, params, tokens)

    assert logits.dtype == jnp.float32
    exact = np.asarray(logits_of(SMALL, params, tokens))
    assert not np.array_equal(logits, exact)
    # bfloat16 rounds at 2^-9 = 0.2 %; about ten roundings lie between input and logit.
    assert_logits_close(logits, exact, 0.04)


def test_future_tokens_do_not_change_past_logits():
    params = llama_reference.random_params(SMALL)
    tokens = random_tokens(SMALL, (2, 9))
    changed = tokens.copy()
    changed[:, 5] = (tokens[:, 5] + 1) % SMALL.vocab_size

    before, after = logits_of(SMALL, params, tokens), logits_of(SMALL, params, changed)

    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-3).all()


def test_a_token_outside_the_vocabulary_gives_nan_and_not_another_token():
    params = llama_reference.random_params(SMALL)
    tokens = random_tokens(SMALL, (2, 9))
    tokens[0, 8] = SMALL.vocab_size

    assert np.isnan(logits_of(SMALL, params, tokens)[0, 8]).all()


def test_parameters_have_the_documented_shapes():
    params = jax.eval_shape(lambda: init_params(SMALL, jax.random.key(0)))

    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "embedding": (19, 24),
        "blocks": {
            "attention_norm": (3, 24),
            "mlp_norm": (3, 24),
            "attention": {
                "query": (3, 24, 24),
                "key": (3, 24, 12),
                "value": (3, 24, 12),
                "output": (3, 24, 24),
            },
            "mlp": {"gate": (3, 24, 20), "up": (3, 24, 20), "down": (3, 20, 24)},
        },
        "norm": (24,),
        "head": (24, 19),
    }
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert "head" not in jax.eval_shape(lambda: init_params(tied, jax.random.key(0)))


@pytest.fixture(scope="module")
def initial():
    config = preset("tiny", 257)
    return config, init_params(config, jax.random.key(0))


def test_initial_deviations_are_the_documented_ones(initial):
    _, params = initial
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]

    # 16,384 or more draws a kernel: the deviation is known to under 1 %.
    for kernel in (params["embedding"], params["head"], attention["key"], mlp["up"]):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.03)
    for kernel in (attention["output"], mlp["down"]):
        assert np.std(kernel) == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.03)
    assert (params["norm"] == 1).all()
    first, second, *_ = attention["query"]
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_initial_loss_is_that_of_a_uniform_guess(initial):
    config, params = initial

    loss = mean_nll(config, params, random_tokens(config, (4, 32)))

    # Logits of deviation 0.02 * sqrt(128) = 0.23 add about 0.23^2 / 2.
    assert loss == pytest.approx(math.log(257), abs=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_presets_have_the_parameters_of_the_formula(name):
    config = preset(name, 32_000)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    hidden, inner = config.hidden_size, config.intermediate_size
    block = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    print(f"{name}: {count:,} parameters with 32,000 tokens")
    assert count == 2 * 32_000 * hidden + config.num_layers * block + hidden


def test_7b_has_the_published_number_of_parameters():
    params = jax.eval_shape(
        lambda: init_params(preset("7b", 32_000), jax.random.key(0))
    )

    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == 6_738_415_616  # Touvron et al. 2023, LLaMA 7B


def test_overrides_replace_fields_of_a_preset():
    config = preset("tiny", 257, remat=True, num_kv_heads=2)

    assert (config.remat, config.num_kv_heads, config.num_heads) == (True, 2, 4)


def test_an_unknown_preset_is_an_error_that_lists_the_names():
    with pytest.raises(UserError, match=r"unknown name '70b'; .*tiny, 5m, 9m, 60m"):
        preset("70b", 257)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 24 does not split into 5 heads"),
        ({"num_heads": 8, "num_kv_heads": 8}, "8 heads of even width"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'.*bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype is 'int8'"),
    ],
)
def test_impossible_configurations_are_errors(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)
