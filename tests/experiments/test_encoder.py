import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax
from experiments.errors import UserError
from experiments.model import encoder as encoder_module
from experiments.model.encoder import Encoder, apply_encoder, init_encoder
from experiments.model.encoder_files import load_encoder
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.groups import parameter_groups
from tests.experiments.encoder_reference import small_encoder, stored
from tests.experiments.references.encoder_logits import minilm_head

pytestmark = pytest.mark.usefixtures("fast_compilation")
KINDS = ["bert", "roberta"]

logits_of = jax.jit(apply_encoder, static_argnums=0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Configuration, parameters and batch of a small BERT and a small RoBERTa."""
    directory = tmp_path_factory.mktemp("encoders")
    return {kind: small_encoder(kind, directory) for kind in KINDS}


def loss_of(config, params, batch, key=None):
    logits = apply_encoder(config, params, **batch, key=key)
    labels = jnp.arange(len(logits)) % config.num_labels
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradients_of = jax.jit(jax.grad(loss_of, 1), static_argnums=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(encoders, kind):
    config, params, batch = encoders[kind]

    logits = logits_of(config, params, **batch)

    assert logits.dtype == jnp.float32
    # Both compute in float32, which rounds at 6e-8; two layers lose a digit or two.
    np.testing.assert_allclose(logits, stored(kind)["logits"], rtol=0, atol=5e-6)


def test_logits_of_minilm_equal_those_of_transformers(minilm_path):
    config, params = load_encoder(minilm_path, 5, jax.random.key(0))
    head = minilm_head()
    params["classifier"] = {
        "kernel": jnp.asarray(head["classifier.weight"].T),
        "bias": jnp.asarray(head["classifier.bias"]),
    }
    expected = stored("minilm")
    tokens, mask, segments = (
        np.array(expected[name]) for name in ("tokens", "mask", "segments")
    )

    logits = logits_of(config, params, tokens, mask, segments)

    assert (config.num_layers, config.hidden_size) == (6, 384)
    assert mask.sum(axis=1).min() < mask.shape[1]
    # The bound; six layers of float32 sums over 384 to 1536 numbers.
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_logits_neither_its_length_nor_its_tokens(encoders, kind):
    config, params, batch = encoders[kind]
    padded = logits_of(config, params, **batch)
    short = {name: values[1:, :9] for name, values in batch.items()}
    other = np.where(batch["mask"] == 1, batch["tokens"], 7)

    # Sums over another length may be in another order: float32 rounding.
    np.testing.assert_allclose(
        logits_of(config, params, **short), padded[1:], rtol=0, atol=2e-6
    )
    changed = logits_of(config, params, **{**batch, "tokens": other})
    np.testing.assert_array_equal(changed, padded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_alone_is_finite_and_so_are_its_gradients(encoders, kind):
    config, params, batch = encoders[kind]
    batch = {**batch, "mask": batch["mask"] * np.array([[1], [1], [0]])}

    assert np.isfinite(logits_of(config, params, **batch)).all()
    for leaf in jax.tree.leaves(gradients_of(config, params, batch)):
        assert np.isfinite(leaf).all()


def test_segments_are_berts_alone(encoders):
    for kind, matters in (("bert", True), ("roberta", False)):
        config, params, batch = encoders[kind]
        zeros = np.zeros_like(batch["tokens"])
        ones = logits_of(config, params, **{**batch, "segments": zeros + 1})
        none = logits_of(config, params, **{**batch, "segments": None})

        assert np.isfinite(ones).all()
        assert (np.abs(ones - none).max() > 1e-3) == matters
        given = logits_of(config, params, **{**batch, "segments": zeros})
        np.testing.assert_allclose(none, given, rtol=0, atol=1e-6)


def test_a_token_outside_the_vocabulary_gives_nan_and_not_another_token(encoders):
    config, params, batch = encoders["bert"]
    tokens = batch["tokens"].copy()
    tokens[1, 2] = config.vocab_size

    logits = logits_of(config, params, **{**batch, "tokens": tokens})

    np.testing.assert_array_equal(np.isnan(logits).all(axis=1), [False, True, False])


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_longer_than_the_positions_are_an_error(encoders, kind):
    config, params, _ = encoders[kind]
    tokens = np.ones((1, 23), np.int32)

    with pytest.raises(UserError, match="have 23 tokens, and the model has 22 pos"):
        apply_encoder(config, params, tokens, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_every_parameter(encoders, kind):
    config, params, batch = encoders[kind]
    grads = gradients_of(config, params, batch)

    # A bias of the keys adds the same number to all scores of a query.
    constant = grads["blocks"]["attention"]["key"].pop("bias")
    np.testing.assert_allclose(constant, 0, atol=1e-6)
    for path, leaf in jax.tree.leaves_with_path(grads):
        layers = config.num_layers if path[0].key == "blocks" else 1
        largest = np.abs(leaf).reshape(layers, -1).max(axis=1)
        assert (largest > 1e-6).all(), path
    positions = np.abs(grads["embeddings"]["position"]).max(axis=1) > 0
    first = {"bert": 0, "roberta": config.padding_id + 1}[kind]
    expected = np.arange(config.position_rows) >= first
    np.testing.assert_array_equal(positions, expected)


def test_rematerialization_changes_no_gradient_with_dropout(encoders):
    config, params, batch = encoders["bert"]
    key = jax.random.key(3)
    kept = gradients_of(config, params, batch, key)
    remat = dataclasses.replace(config, remat=True)

    recomputed = gradients_of(remat, params, batch, key)

    for expected, actual in zip(*map(jax.tree.leaves, (kept, recomputed)), strict=True):
        # XLA may order the recomputed sums otherwise: float32 rounding, no more.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_transformers_has_it(encoders, kind, monkeypatch):
    config, params, batch = encoders[kind]
    rates = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "classifier_dropout": 0.4}
    config = dataclasses.replace(config, **rates)
    places = []

    def dropped(x, rate, key):
        places.append((x.shape, rate))
        assert key is not None
        return x

    monkeypatch.setattr(encoder_module, "_dropped", dropped)
    jax.eval_shape(
        lambda key: apply_encoder(config, params, **batch, key=key), jax.random.key(0)
    )

    # Embeddings; probabilities and both outputs of the scanned block; what the head
    # reads, and in RoBERTa what its first layer reads.
    outputs = ((3 * 22, 32), 0.2)
    head = [((3, 32), 0.4)] * {"bert": 1, "roberta": 2}[kind]
    block = [((3, 4, 22, 22), 0.3), outputs, outputs]
    # A scan may trace its body more than once.
    once = [outputs, *block, *head]
    assert places[:4] == once[:4]
    assert places[-len(head) :] == head
    assert set(places) == set(once)


def test_a_key_drops_and_every_layer_has_its_own(encoders):
    config, params, batch = encoders["bert"]
    first, second = jax.random.split(jax.random.key(0))
    dropped = logits_of(config, params, **batch, key=first)
    model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    embedded_with, blocks_with, _, pooled_with = jax.random.split(first, 4)
    layers_with = jax.random.split(blocks_with, config.num_layers)

    def one_after_the_other(params):
        whole = nnx.merge(nnx.graphdef(model), params)
        tokens, mask, segments = (batch[k] for k in ("tokens", "mask", "segments"))
        hidden = whole.embeddings(tokens, segments, embedded_with)
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            block = nnx.merge(nnx.graphdef(model.blocks), layer)
            hidden = block(hidden, mask > 0, layers_with[i])
        pooled = jnp.tanh(whole.pooler(hidden.reshape(3, 22, 32)[:, 0]))
        rate = config.classifier_dropout
        kept = jax.random.bernoulli(pooled_with, 1 - rate, pooled.shape)
        return whole.classifier(jnp.where(kept, pooled / (1 - rate), 0))

    expected = jax.jit(one_after_the_other)(params)
    np.testing.assert_allclose(dropped, expected, rtol=0, atol=5e-6)
    other = logits_of(config, params, **batch, key=second)
    assert np.abs(dropped - other).max() > 1e-2
    assert np.abs(dropped - logits_of(config, params, **batch)).max() > 1e-2


def test_bfloat16_compute_is_close_and_gives_float32_logits(encoders):
    config, params, batch = encoders["bert"]
    narrow = dataclasses.replace(config, compute_dtype="bfloat16")
    logits = logits_of(narrow, params, **batch)
    exact = logits_of(config, params, **batch)

    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact).max()
    # bfloat16 rounds at 2^-9 = 0.2 %; about ten roundings lie between input and logit.
    assert 0 < error <= 0.04 * np.abs(exact).max()
    grads = gradients_of(narrow, params, batch, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_a_galore_step_with_subspace_gradients_is_the_step_with_full_ones(encoders):
    config, params, batch = encoders["bert"]
    adamw = optax.adamw(1e-2)
    groups = {"norms": adamw, "rest": adamw, "classifier": adamw}
    galore = lowrank_optax.galore(1e-2, rank=4, update_proj_gap=100)
    optimizer = optax.partition({"blocks": galore, **groups}, parameter_groups)
    key = jax.random.key(5)
    gradient = lowrank_optax.subspace_value_and_grad(
        lambda params: loss_of(config, params, batch, key), optimizer
    )

    @jax.jit
    def first_step(params):
        state = optimizer.init(params)
        _, grads, state = gradient.full(params, state)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def both_steps(params, state):
        results = []
        for evaluate in (gradient, gradient.full):
            loss, grads, kept = evaluate(params, state)
            updates, _ = optimizer.update(grads, kept, params, refresh=False)
            results.append((loss, updates))
        return results, grads

    (inside, full), grads = both_steps(*first_step(params))

    plans = lowrank_optax.projections(optimizer, params)
    projected = {name for name, plan in plans.items() if plan.is_projected}
    assert len(projected) == 7
    assert "['pooler']['kernel']" in projected
    np.testing.assert_allclose(inside[0], full[0], rtol=1e-6)
    for (path, grad), actual, expected in zip(
        jax.tree.leaves_with_path(grads),
        *map(jax.tree.leaves, (inside[1], full[1])),
        strict=True,
    ):
        # Sums in another order: float32 rounding, 1e-6 of a gradient's largest number.
        # Adam divides by the gradient's own size, so small ones round further.
        error = np.abs(actual - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), path
        assert np.abs(grad).max() > 0 or "key" in str(path), path


def test_matrices_are_blocks_vectors_norms_and_the_head_a_group_of_its_own(encoders):
    _, params, _ = encoders["bert"]
    layer = {"kernel": "blocks", "bias": "norms"}
    norm = {"scale": "norms", "bias": "norms"}
    expected = {
        "embeddings": {
            **dict.fromkeys(("word", "position", "segment"), "rest"),
            "norm": norm,
        },
        "blocks": {
            "attention": dict.fromkeys(("query", "key", "value", "output"), layer),
            "attention_norm": norm,
            "mlp": {"up": layer, "down": layer},
            "mlp_norm": norm,
        },
        "pooler": layer,
        "classifier": {"kernel": "classifier", "bias": "classifier"},
    }
    adapter = {"down": np.ones((2, 32, 4)), "up": np.ones((2, 4, 32))}

    assert parameter_groups(params) == expected
    adapted = {"model": params, "adapters": {"blocks.attention.query.kernel": adapter}}
    frozen = jax.tree.map(lambda x: "frozen" if x == "blocks" else x, expected)
    assert parameter_groups(adapted) == {
        "model": frozen,
        "adapters": {
            "blocks.attention.query.kernel": {"down": "blocks", "up": "blocks"}
        },
    }


def test_initial_parameters_have_the_documented_shapes_and_deviations():
    config = EncoderConfig("roberta", 90, 64, 80, 3, 4, 40, num_labels=5, padding_id=1)
    params = jax.jit(init_encoder, static_argnums=0)(config, jax.random.key(0))

    def layer(*shape):
        return {"kernel": shape, "bias": (*shape[:-2], shape[-1])}

    square, norm = layer(3, 64, 64), {"scale": (3, 64), "bias": (3, 64)}
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "embeddings": {
            "word": (90, 64),
            "position": (42, 64),
            "segment": (2, 64),
            "norm": {"scale": (64,), "bias": (64,)},
        },
        "blocks": {
            "attention": dict.fromkeys(("query", "key", "value", "output"), square),
            "attention_norm": norm,
            "mlp": {"up": layer(3, 64, 80), "down": layer(3, 80, 64)},
            "mlp_norm": norm,
        },
        "pooler": layer(64, 64),
        "classifier": layer(64, 5),
    }
    query = params["blocks"]["attention"]["query"]["kernel"]
    # 4,096 or more draws: the deviation is known to about 1 %.
    for leaf in (params["embeddings"]["word"], params["pooler"]["kernel"], query):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.05)
    assert np.abs(np.corrcoef(query[0].ravel(), query[1].ravel())[0, 1]) < 0.05
    norm = params["blocks"]["mlp_norm"]
    assert (norm["scale"] == 1).all()
    assert (norm["bias"] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "albert"}, "kind is 'albert'; choose one of bert, roberta"),
        ({"num_heads": 5}, "hidden_size 32 does not split into 5 heads"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"max_positions": -2}, "max_positions is -2"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"padding_id": 61}, "padding_id is 61; give a token from 0 to 60"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0; .* at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'.*bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype is 'int8'"),
    ],
)
def test_impossible_configurations_are_errors(change, message):
    config = EncoderConfig("bert", 61, 32, 48, 2, 4)

    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)
