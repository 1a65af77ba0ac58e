import dataclasses
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments.data.tokenizers import load_tokenizer
from experiments.errors import UserError
from experiments.model.hugging_face import load_llama, save_llama
from experiments.model.shape import LlamaConfig
from tests.experiments import llama_reference
from tests.experiments.same_bits import assert_same_bits
from tests.experiments.shards import into_two_shards

CONFIG = LlamaConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rms_norm_eps=1e-3,
    rope_theta=50.0,
)
HUGGING_FACE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
}


def hugging_face_tensors(dtype=np.float32):
    """What LlamaForCausalLM.state_dict() holds for HUGGING_FACE_CONFIG."""
    shapes = {
        "model.embed_tokens.weight": (19, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (19, 24),
    }
    for i in (0, 1):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (24,),
            layer + "self_attn.q_proj.weight": (24, 24),
            layer + "self_attn.k_proj.weight": (12, 24),
            layer + "self_attn.v_proj.weight": (12, 24),
            layer + "self_attn.o_proj.weight": (24, 24),
            layer + "post_attention_layernorm.weight": (24,),
            layer + "mlp.gate_proj.weight": (20, 24),
            layer + "mlp.up_proj.weight": (20, 24),
            layer + "mlp.down_proj.weight": (24, 20),
        }
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(shape).astype(dtype) for k, shape in shapes.items()}


def write_model(directory, tensors, **changes):
    directory.mkdir(exist_ok=True)
    config = {**HUGGING_FACE_CONFIG, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_every_tensor_lands_transposed_in_its_place(tmp_path):
    tensors = hugging_face_tensors()

    config, params = load_llama(write_model(tmp_path, tensors))

    assert config == CONFIG
    layer = tensors["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(params["blocks"]["attention"]["key"][1], layer.T)
    for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
        layer = tensors[f"model.layers.0.mlp.{theirs}_proj.weight"]
        np.testing.assert_array_equal(params["blocks"]["mlp"][ours][0], layer.T)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    np.testing.assert_array_equal(params["embedding"], embedding)
    np.testing.assert_array_equal(params["head"], head.T)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_saved_model_loads_bit_for_bit(tmp_path, param_dtype, tie_embeddings):
    config = dataclasses.replace(
        CONFIG, param_dtype=param_dtype, tie_embeddings=tie_embeddings
    )
    params = llama_reference.random_params(config)

    save_llama(tmp_path / "new" / "model", config, params)
    loaded_config, loaded = load_llama(tmp_path / "new" / "model")

    assert loaded_config == config
    assert_same_bits(loaded, params)


def test_a_saved_model_has_hugging_faces_names_shapes_and_configuration(tmp_path):
    save_llama(tmp_path, CONFIG, llama_reference.random_params(CONFIG))

    saved = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    expected = hugging_face_tensors()
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in expected.items()
    }
    assert config.items() >= HUGGING_FACE_CONFIG.items()
    assert config["torch_dtype"] == "float32"
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.skipif(
    not llama_reference.STORIES.exists(),
    reason="needs the trained model ../shared/data/stories260K",
)
def test_a_trained_model_is_saved_as_hugging_face_saved_it(tmp_path):
    save_llama(tmp_path, *load_llama(llama_reference.STORIES))

    saved = load_file(tmp_path / "model.safetensors")
    original = load_file(llama_reference.STORIES / "model.safetensors")
    assert_same_bits(saved, original)
    config = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((llama_reference.STORIES / "config.json").read_text())
    for name in published.keys() - {"bos_token_id", "eos_token_id"}:
        assert config[name] == published[name]


def test_shards_load_like_a_single_file(tmp_path):
    tensors = hugging_face_tensors()
    expected = load_llama(write_model(tmp_path / "single", tensors))
    sharded = write_model(tmp_path / "sharded", {})
    into_two_shards(sharded, tensors)

    config, params = load_llama(sharded)

    assert config == expected[0]
    assert_same_bits(params, expected[1])

    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-1\.safetensors is missing"):
        load_llama(sharded)


@pytest.mark.parametrize(
    ("file_dtype", "param_dtype"),
    [(np.float16, "float32"), (ml_dtypes.bfloat16, "bfloat16")],
)
def test_half_precision_files_load_exactly(tmp_path, file_dtype, param_dtype):
    tensors = hugging_face_tensors(file_dtype)

    config, params = load_llama(write_model(tmp_path, tensors))

    assert config.param_dtype == param_dtype
    assert params["embedding"].dtype == param_dtype
    np.testing.assert_array_equal(
        np.asarray(params["embedding"], np.float64),
        tensors["model.embed_tokens.weight"].astype(np.float64),
    )


def test_defaults_nested_positions_and_stored_frequencies_are_understood(tmp_path):
    tensors = hugging_face_tensors()
    for i in (0, 1):
        for name in ("k_proj", "v_proj"):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = np.ones(
                (24, 24), np.float32
            )
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(3, np.float32)
    rope = {"rope_type": "default", "rope_theta": 70}
    write_model(tmp_path, tensors, rope_parameters=rope)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))

    config, _ = load_llama(tmp_path)

    assert (config.num_kv_heads, config.rms_norm_eps) == (4, 1e-6)
    assert (config.rope_theta, config.tie_embeddings) == (70.0, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling .* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supp"),
        ({"rope_parameters": {"factor": 8.0}}, "factor 8.0 is not supported"),
        ({"head_dim": 8}, "head_dim 8 is not supported; .* = 6"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size is '24'; give a value of type int"),
        (
            {"tie_word_embeddings": 1},
            "tie_word_embeddings is 1; give a value of type bool",
        ),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is missing \(9"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\..* is not expected \(9"),
        ({"tie_word_embeddings": True}, "set its tie_word_embeddings to false"),
        ({"vocab_size": 20}, r"shape \(19, 24\), config.json says \(20, 24\)"),
    ],
)
def test_configurations_that_do_not_fit_are_errors(tmp_path, changes, message):
    write_model(tmp_path, hugging_face_tensors(), **changes)

    with pytest.raises(UserError, match=message):
        load_llama(tmp_path)


def test_a_tied_head_may_be_stored_too(tmp_path):
    tensors = hugging_face_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = {**HUGGING_FACE_CONFIG, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head" not in load_llama(tmp_path)[1]
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="set its tie_word_embeddings to false"):
        load_llama(tmp_path)


def test_a_kernel_that_is_not_transposed_is_an_error(tmp_path):
    tensors = hugging_face_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)

    with pytest.raises(UserError, match=rf"{name} has shape \(24, 20\).* \(20, 24\)"):
        load_llama(write_model(tmp_path, tensors))


def test_integer_tensors_are_an_error(tmp_path):
    tensors = hugging_face_tensors()
    tensors["model.norm.weight"] = np.ones(24, np.int8)

    with pytest.raises(UserError, match=r"model\.norm\.weight has dtype I8"):
        load_llama(write_model(tmp_path, tensors))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config\.json cannot be read \(No such file"),
        ("config.json", b"{", r"config\.json is not JSON"),
        ("config.json", b"\xff", r"config\.json is not JSON"),
        ("config.json", b"[]", r"config\.json does not hold a JSON object"),
        ("config.json", b'{"rope_parameters": [1]}', "rope_parameters is no object"),
        ("model.safetensors", None, r"model\.safetensors is missing"),
        ("model.safetensors", b"half", r"model\.safetensors is not a safetensors file"),
    ],
)
def test_missing_or_broken_files_are_errors(tmp_path, file, content, message):
    path = write_model(tmp_path, hugging_face_tensors()) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match=message):
        load_llama(tmp_path)


def test_saving_overwrites_nothing(tmp_path):
    params = llama_reference.random_params(CONFIG)
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="is not empty; save the model in a new dir"):
        save_llama(tmp_path, CONFIG, params)
    with pytest.raises(UserError, match="is a file; give a directory"):
        save_llama(tmp_path / "notes.txt", CONFIG, params)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("where", ["link", "here"])
def test_a_directory_that_cannot_be_replaced_is_filled(where, tmp_path, monkeypatch):
    params = llama_reference.random_params(CONFIG)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    save_llama(tmp_path / "link" if where == "link" else Path("."), CONFIG, params)
    assert (tmp_path / "link").is_symlink()
    assert load_llama(tmp_path / "real")[0].hidden_size == CONFIG.hidden_size
    assert sorted(x.name for x in tmp_path.iterdir()) == ["link", "real"]


def test_a_saved_model_carries_its_tokenizer(tmp_path):
    tokenizer = load_tokenizer("bytes")
    config = dataclasses.replace(CONFIG, vocab_size=257, max_positions=77)
    params = llama_reference.random_params(config)

    save_llama(tmp_path / "model", config, params, tokenizer)

    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (256, 256)
    assert raw["max_position_embeddings"] == 77
    loaded = load_tokenizer(str(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.encode("né"), tokenizer.encode("né"))
    assert load_llama(tmp_path / "model")[0] == config


def test_everybody_may_read_a_saved_model_whom_the_umask_lets(tmp_path):
    params = llama_reference.random_params(CONFIG)
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        previous = os.umask(umask)
        try:
            save_llama(tmp_path / f"{umask}", CONFIG, params, load_tokenizer("bytes"))
        finally:
            os.umask(previous)
        files = list((tmp_path / f"{umask}").iterdir())
        assert len(files) == 4
        assert {path.stat().st_mode & 0o777 for path in files} == {mode}
