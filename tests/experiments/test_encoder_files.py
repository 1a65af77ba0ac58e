import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.errors import UserError
from experiments.model.encoder import init_encoder
from experiments.model.encoder_files import (
    load_encoder,
    read_encoder_shape,
    save_encoder,
)
from experiments.model.encoder_shape import EncoderConfig
from tests.experiments.encoder_reference import CONFIGS, write_encoder
from tests.experiments.references.encoder_logits import BERT, ROBERTA, tensors_of
from tests.experiments.same_bits import assert_same_bits
from tests.experiments.shards import into_two_shards

pytestmark = pytest.mark.usefixtures("fast_compilation")
KEY = jax.random.key(0)
SMALL = EncoderConfig(
    kind="bert",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    max_positions=22,
    layer_norm_eps=1e-2,
    num_labels=3,
)
LAYER = "bert.encoder.layer.1."


def renamed(tensors, **changes):
    """Returns the tensors with parts of their names replaced."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def test_every_tensor_lands_transposed_in_its_place(tmp_path):
    tensors = tensors_of(BERT)

    config, params = load_encoder(write_encoder(tmp_path, BERT), 3, KEY)

    assert config == SMALL
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    for ours, place, theirs in (
        (attention["query"], "kernel", "attention.self.query.weight"),
        (attention["key"], "kernel", "attention.self.key.weight"),
        (attention["value"], "bias", "attention.self.value.bias"),
        (attention["output"], "kernel", "attention.output.dense.weight"),
        (mlp["up"], "kernel", "intermediate.dense.weight"),
        (mlp["down"], "kernel", "output.dense.weight"),
        (params["blocks"]["mlp_norm"], "scale", "output.LayerNorm.weight"),
    ):
        np.testing.assert_array_equal(ours[place][1], tensors[LAYER + theirs].T)
    for ours, theirs in (("word", "word"), ("segment", "token_type")):
        table = tensors[f"bert.embeddings.{theirs}_embeddings.weight"]
        np.testing.assert_array_equal(params["embeddings"][ours], table)
    head = tensors["classifier.weight"]
    np.testing.assert_array_equal(params["classifier"]["kernel"], head.T)


def test_robertas_positions_begin_behind_those_of_padding(tmp_path):
    write_encoder(tmp_path, ROBERTA)

    config, params = load_encoder(tmp_path, 3, KEY)

    assert (config.kind, config.padding_id, config.max_positions) == ("roberta", 1, 22)
    assert params["embeddings"]["position"].shape == (24, 32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layouts_of_other_exports_load_alike(tmp_path, kind):
    expected = load_encoder(write_encoder(tmp_path / "plain", CONFIGS[kind]), 3, KEY)
    old = renamed(
        tensors_of(CONFIGS[kind]),
        **{
            f"{kind}.": "",
            "LayerNorm.weight": "LayerNorm.gamma",
            "LayerNorm.bias": "LayerNorm.beta",
        },
    )
    others = {
        "embeddings.position_ids": np.arange(22)[None],
        "cls.predictions.bias": np.ones(61, np.float32),
        "lm_head.dense.weight": np.ones((32, 32), np.float32),
    }
    if kind == "roberta":
        others["roberta.pooler.dense.weight"] = np.ones((32, 32), np.float32)
    write_encoder(tmp_path / "old", CONFIGS[kind], {**old, **others})

    config, params = load_encoder(tmp_path / "old", 3, KEY)

    assert config == expected[0]
    assert_same_bits(params, expected[1])


def test_a_head_that_does_not_fit_or_is_not_there_is_drawn(tmp_path):
    headless = {k: v for k, v in tensors_of(BERT).items() if "embeddings" in k}
    headless |= {k: v for k, v in tensors_of(BERT).items() if "encoder" in k}
    write_encoder(tmp_path / "headless", BERT, headless)
    write_encoder(tmp_path / "three", BERT)
    read = load_encoder(tmp_path / "three", 3, KEY)[1]

    config, other = load_encoder(tmp_path / "three", 1, KEY)
    _, fresh = load_encoder(tmp_path / "headless", 3, KEY)

    assert config.num_labels == 1
    assert other["classifier"]["kernel"].shape == (32, 1)
    assert_same_bits(other["pooler"], read["pooler"])
    drawn = jax.jit(init_encoder, static_argnums=0)(SMALL, KEY)
    for name in ("pooler", "classifier"):
        for place in ("kernel", "bias"):
            # Draws that are compiled otherwise may round otherwise.
            np.testing.assert_allclose(
                fresh[name][place], drawn[name][place], rtol=0, atol=1e-8
            )
    assert_same_bits(fresh["blocks"], read["blocks"])
    again = load_encoder(tmp_path / "headless", 3, jax.random.key(1))[1]
    assert np.abs(again["pooler"]["kernel"] - fresh["pooler"]["kernel"]).max() > 0.01


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_encoder_has_hugging_faces_names_and_loads_bit_for_bit(tmp_path, kind):
    source = write_encoder(tmp_path / "source", CONFIGS[kind])
    config, params = load_encoder(source, None, KEY)

    save_encoder(tmp_path / "new" / "model", config, params, None, ["no", "so", "yes"])
    loaded_config, loaded = load_encoder(tmp_path / "new" / "model", None, KEY)

    saved = load_file(tmp_path / "new" / "model" / "model.safetensors")
    assert_same_bits(saved, tensors_of(CONFIGS[kind]))
    assert loaded_config == config == read_encoder_shape(source)
    assert_same_bits(loaded, params)
    raw = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    own = ("id2label", "label2id", "bos_token_id", "eos_token_id")
    assert (
        raw.items() >= {k: v for k, v in CONFIGS[kind].items() if k not in own}.items()
    )
    assert raw["id2label"] == {"0": "no", "1": "so", "2": "yes"}
    assert raw["label2id"] == {"no": 0, "so": 1, "yes": 2}
    assert raw["problem_type"] == "single_label_classification"


def test_a_regression_says_so_and_copies_the_tokenizer_it_is_given(tmp_path):
    source = write_encoder(tmp_path / "source", BERT)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "notes.txt").write_text("mine")
    config, params = load_encoder(source, 1, KEY)

    save_encoder(tmp_path / "model", config, params, source)

    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (raw["problem_type"], raw["id2label"]) == ("regression", {"0": "LABEL_0"})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")
    ]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == '{"a": 1}'


def test_saving_overwrites_nothing_unless_it_may(tmp_path):
    config, params = load_encoder(write_encoder(tmp_path / "source", BERT), 3, KEY)
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="is not empty; save the model in a new dir"):
        save_encoder(place, config, params)
    with pytest.raises(UserError, match="is a file; give a directory"):
        save_encoder(place / "notes.txt", config, params)
    with pytest.raises(UserError, match="label_names are a, a, b; the model has 3"):
        save_encoder(place, config, params, None, ["a", "a", "b"], replace=True)
    assert [path.name for path in place.iterdir()] == ["notes.txt"]

    # The tokenizer may come from what is replaced.
    (place / "vocab.txt").write_text("[PAD]\n")
    save_encoder(place, config, params, place, replace=True)
    names = {path.name for path in place.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"place", "source"}


def test_shards_load_like_a_single_file(tmp_path):
    expected = load_encoder(write_encoder(tmp_path / "single", BERT), 3, KEY)
    tensors = tensors_of(BERT)
    sharded = write_encoder(tmp_path / "sharded", BERT, {})
    into_two_shards(sharded, tensors)

    config, params = load_encoder(sharded, 3, KEY)

    assert config == expected[0]
    assert_same_bits(params, expected[1])


@pytest.mark.parametrize(
    ("file_dtype", "param_dtype"),
    [(np.float16, "float32"), (ml_dtypes.bfloat16, "bfloat16")],
)
def test_half_precision_files_load_exactly_and_the_drawn_head_follows(
    tmp_path, file_dtype, param_dtype
):
    tensors = {k: v.astype(file_dtype) for k, v in tensors_of(BERT).items()}
    write_encoder(tmp_path, BERT, tensors)

    config, params = load_encoder(tmp_path, 2, KEY)

    assert config.param_dtype == param_dtype
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    assert dtypes == {jnp.dtype(param_dtype)}
    np.testing.assert_array_equal(
        np.asarray(params["embeddings"]["word"], np.float64),
        tensors["bert.embeddings.word_embeddings.weight"].astype(np.float64),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "distilbert"}, "model_type 'distilbert' is not supported; .*"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'; give a value of type int"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout is 1.5"),
        ({"num_hidden_layers": 3}, r"tensor encoder\.layer\.2\..* is missing \(16"),
        (
            {"num_hidden_layers": 1},
            r"tensor bert\.encoder\.layer\.1\..* is not expected \(16",
        ),
        (
            {"vocab_size": 62},
            r"word_embeddings\.weight has shape \(61, 32\), config.json says \(62, 32",
        ),
        (
            {"max_position_embeddings": 30},
            r"position_embeddings\.weight has shape \(22, 32\), .* says \(30, 32\)",
        ),
        ({"model_type": "roberta"}, r"tensor embeddings\.LayerNorm\.bias is missing"),
    ],
)
def test_configurations_that_do_not_fit_are_errors(tmp_path, changes, message):
    write_encoder(tmp_path, {**BERT, **changes}, tensors_of(BERT))

    with pytest.raises(UserError, match=message) as error:
        load_encoder(tmp_path, 3, KEY)
    assert "\n" not in str(error.value)


def test_a_head_of_another_width_and_integers_are_errors(tmp_path):
    tensors = tensors_of(BERT)
    wide = {**tensors, "classifier.weight": np.ones((3, 40), np.float32)}
    with pytest.raises(UserError, match=r"classifier\.weight has shape \(3, 40\)"):
        load_encoder(write_encoder(tmp_path / "wide", BERT, wide), 3, KEY)

    name = LAYER + "output.LayerNorm.bias"
    integers = {**tensors, name: np.ones(32, np.int8)}
    with pytest.raises(UserError, match=r"LayerNorm\.bias has dtype I8"):
        load_encoder(write_encoder(tmp_path / "integers", BERT, integers), 3, KEY)


def test_a_missing_tensor_beside_other_names_is_an_error(tmp_path):
    tensors = tensors_of(BERT)
    del tensors["bert.pooler.dense.bias"]
    with pytest.raises(UserError, match=r"tensor pooler\.dense\.bias is missing \(1 "):
        load_encoder(write_encoder(tmp_path, BERT, tensors), 3, KEY)
