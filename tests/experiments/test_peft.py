"""PEFT's layout: what peft wrote is read, what is written is as peft has it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.errors import UserError
from experiments.model.adapters import merged, with_adapters
from experiments.model.encoder import apply_encoder
from experiments.model.encoder_files import load_encoder
from experiments.model.extraction import extract
from experiments.model.hugging_face import load_llama
from experiments.model.llama import apply
from experiments.model.peft import load_peft_adapter, save_peft_adapter
from tests.experiments.references import peft_adapters as reference

pytestmark = pytest.mark.usefixtures("fast_compilation")
STORED = json.loads(reference.STORED.read_text())
NAMES = list(reference.MODELS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

apply_llama = jax.jit(apply, static_argnums=0)
apply_encoder = jax.jit(apply_encoder, static_argnums=0)


class Model(NamedTuple):
    """A small model, and how to compute its logits."""

    name: str
    config: Any
    params: Any

    def logits(self, params):
        inputs: dict[str, Any] = reference.inputs_of(self.name)
        if self.name == "llama":
            return np.asarray(apply_llama(self.config, params, inputs["tokens"]))
        return np.asarray(apply_encoder(self.config, params, **inputs))


def read_model(name, directory):
    reference.write_model(directory, name)
    if name == "llama":
        return Model(name, *load_llama(directory))
    return Model(name, *load_encoder(directory, 3, jax.random.key(0)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {name: read_model(name, directory / name) for name in NAMES}


def write_theirs(directory, name, dtype: Any = np.float32, **changes):
    """Writes the adapter that peft wrote, with other settings; returns its place."""
    directory.mkdir(exist_ok=True)
    raw = STORED[name]["config"] | changes
    (directory / CONFIG).write_text(json.dumps(raw))
    tensors = reference.adapter_of(STORED[name]["shapes"])
    tensors = {k: x.astype(dtype) for k, x in tensors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def tuned(model):
    """Parameters as after fine-tuning of the matrices and of the classifier."""
    rng = np.random.default_rng(6)

    def leaf(path, old):
        noise = 0.1 * rng.standard_normal(old.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        is_vector = "norm" in name or ("bias" in name and "blocks" in name)
        return (
            old if is_vector or "embedding" in name or "head" in name else old + noise
        )

    return jax.tree_util.tree_map_with_path(leaf, model.params)


def write_ours(directory: Path) -> None:
    """Writes what ``peft_adapters check`` compares: base, adapter and logits."""
    for name in NAMES:
        for what in ("lora", "extracted"):
            place = directory / f"{name}-{what}"
            model = read_model(name, place / "base")
            params, scale = with_trained_adapters(model), 2.0
            if what == "extracted":
                found = extract(tuned(model), model.params, energy=0.9)
                params, scale = found.params, 1.0
            base = str(place / "base")
            save_peft_adapter(place / "adapter", params, model.config, base, scale)
            np.save(place / "logits.npy", model.logits(merged(params, scale)))


def with_trained_adapters(model):
    params = with_adapters(model.params, "lora", 3, jax.random.key(1), "uniform")
    rng = np.random.default_rng(7)
    params["adapters"] = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32),
        params["adapters"],
    )
    return params


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_wrote_computes_what_peft_computed(models, tmp_path, name):
    model = models[name]

    params, scale = load_peft_adapter(
        write_theirs(tmp_path, name), model.params, model.config
    )

    logits = model.logits(merged(params, scale))
    wanted = np.asarray(STORED[name]["logits"])
    assert np.abs(wanted - model.logits(model.params)).max() > 0.1
    # Both compute in float32; two layers lose a digit or two.
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again(models, tmp_path, name):
    model = models[name]
    params = with_trained_adapters(model)

    save_peft_adapter(tmp_path / "new", params, model.config, "base", scale=2.0)
    loaded, scale = load_peft_adapter(tmp_path / "new", model.params, model.config)

    assert scale == 2.0
    for one, other in zip(
        *(jax.tree.leaves(merged(x, 2.0)) for x in (loaded, params)), strict=True
    ):
        # The pooler was merged on the host.
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_names_and_settings_are_those_of_peft(models, tmp_path):
    model = models["bert"]
    save_peft_adapter(tmp_path, with_trained_adapters(model), model.config, "base", 2.0)

    raw = json.loads((tmp_path / CONFIG).read_text())
    assert (
        raw.items()
        >= {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": "base",
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {},
            "alpha_pattern": {},
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": ["classifier", "pooler"],
        }.items()
    )
    assert raw["target_modules"] == [
        *("attention.output.dense", "attention.self.key", "attention.self.query"),
        *("attention.self.value", "intermediate.dense", "output.dense"),
    ]
    # peft ignores what it does not know, with a warning.
    assert raw.keys() <= STORED["bert"]["config"].keys()
    shapes = {k: list(x.shape) for k, x in load_file(tmp_path / WEIGHTS).items()}
    theirs = STORED["bert"]["shapes"]
    pooler = "base_model.model.bert.pooler.dense"
    wanted = {k: x for k, x in theirs.items() if pooler not in k}
    assert shapes.items() >= wanted.items()
    assert shapes[f"{pooler}.weight"] == [32, 32]
    assert shapes[f"{pooler}.bias"] == [32]


def test_a_llamas_names_are_those_of_peft(models, tmp_path):
    model = models["llama"]
    theirs = write_theirs(tmp_path / "theirs", "llama")
    params, scale = load_peft_adapter(theirs, model.params, model.config)

    save_peft_adapter(tmp_path / "ours", params, model.config, "llama", scale)

    found = load_file(tmp_path / "ours" / WEIGHTS)
    wanted = load_file(theirs / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        # The alpha of a module is a factor of its up.
        factor = 0.25 if "down_proj.lora_B" in name else 1
        factor *= 2 if "layers.1.self_attn.q_proj.lora_B" in name else 1
        np.testing.assert_allclose(tensor, factor * wanted[name], rtol=1e-6)
    raw = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert raw["task_type"] == "CAUSAL_LM"
    assert raw["modules_to_save"] is None
    query = "model.layers.1.self_attn.q_proj"
    assert (raw["rank_pattern"], raw["alpha_pattern"]) == ({query: 2}, {query: 4})
    ends = ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert raw["target_modules"] == ends


def test_targets_have_their_whole_names_if_an_ending_is_not_their_own(models, tmp_path):
    model = models["roberta"]
    theirs = write_theirs(tmp_path / "theirs", "roberta")
    params, scale = load_peft_adapter(theirs, model.params, model.config)
    del params["adapters"]["blocks.attention.output.kernel"]

    save_peft_adapter(tmp_path / "ours", params, model.config, "roberta", scale)

    raw = json.loads((tmp_path / "ours" / CONFIG).read_text())
    layer = "roberta.encoder.layer.1"
    ours = [f"{layer}.attention.self.value", f"{layer}.output.dense"]
    assert raw["target_modules"] == ours


@pytest.mark.parametrize("name", NAMES)
def test_an_extracted_adapter_is_written_with_the_rank_of_each_layer(
    models, tmp_path, name
):
    model = models[name]
    found = extract(tuned(model), model.params, energy=0.9)

    save_peft_adapter(tmp_path / "new", found.params, model.config, name)
    loaded, scale = load_peft_adapter(tmp_path / "new", model.params, model.config)

    assert scale == 1
    raw = json.loads((tmp_path / "new" / CONFIG).read_text())
    tensors = load_file(tmp_path / "new" / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.")
            module = module.removesuffix(".lora_A.weight")
            assert len(tensor) == raw["rank_pattern"].get(module, raw["r"])
    assert sum(x.nbytes for x in tensors.values()) == found.adapter_bytes
    for one, other in zip(
        *(jax.tree.leaves(merged(x)) for x in (loaded, found.params)), strict=True
    ):
        # NumPy's products and XLA's are rounded differently.
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tensor", "place"),
    [
        ("bert", "bert.embeddings.word_embeddings", ("embeddings", "word")),
        ("llama", "lm_head", ("head",)),
        ("llama", "model.embed_tokens", ("embedding",)),
    ],
)
def test_what_an_adapter_has_as_a_whole_replaces_the_models(
    models, tmp_path, name, tensor, place
):
    model, file = models[name], write_theirs(tmp_path, name) / WEIGHTS
    value = 1 + reference.model_tensors(name)[f"{tensor}.weight"]
    save_file({**load_file(file), f"base_model.model.{tensor}.weight": value}, file)

    params, _ = load_peft_adapter(tmp_path, model.params, model.config)

    found, before = params["model"], model.params
    for key in place:
        found, before = found[key], before[key]
    np.testing.assert_allclose(found, before + 1, atol=1e-6)


def test_half_precision_adapters_become_float32(models, tmp_path):
    model = models["llama"]
    theirs = write_theirs(tmp_path, "llama", ml_dtypes.bfloat16)
    params, _ = load_peft_adapter(theirs, model.params, model.config)
    assert {x.dtype for x in jax.tree.leaves(params["adapters"])} == {jnp.dtype("f4")}


def test_nothing_is_written_into_a_directory_that_holds_something(models, tmp_path):
    model = models["llama"]
    (tmp_path / "mine").write_text("mine")
    params = with_trained_adapters(model)
    with pytest.raises(UserError, match="is not empty"):
        save_peft_adapter(tmp_path, params, model.config, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    save_peft_adapter(tmp_path, params, model.config, "base", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_an_empty_adapter_is_not_written(models, tmp_path):
    model = models["bert"]
    params = with_adapters(model.params, "lora", 3, jax.random.key(1))
    params["adapters"] = jax.tree.map(jnp.zeros_like, params["adapters"])
    with pytest.raises(UserError, match="no block matrix has an adapter"):
        save_peft_adapter(tmp_path / "new", params, model.config, "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"use_rslora": True}, "use_rslora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"r": None}, "r is None; give an integer above 0"),
        ({"r": 0}, "r is 0; give an integer above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; give a number above 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern of q is 1.5; give an integer"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', which is no regular"),
        ({"r": 5}, r"lora_A.weight has shape \(4, 24\), .* say \(5, 24\)"),
    ],
)
def test_settings_that_do_not_fit_are_errors(models, tmp_path, changes, message):
    theirs = write_theirs(tmp_path, "llama", **changes)
    with pytest.raises(UserError, match=message) as error:
        load_peft_adapter(theirs, models["llama"].params, models["llama"].config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.mlp.down_proj", "0.mlp.other", "other.* is not expected"),
        ("0.mlp.down_proj.lora_B", "x", "down_proj.lora_B.weight is missing"),
        ("layers.0.mlp.down_proj", "embed_tokens", "embed_tokens.* is not expected"),
    ],
)
def test_tensors_that_do_not_fit_are_errors(models, tmp_path, old, new, message):
    file = write_theirs(tmp_path, "llama") / WEIGHTS
    tensors = {k.replace(old, new): x for k, x in load_file(file).items()}
    if new == "x":
        tensors = {k: x for k, x in tensors.items() if k.endswith("weight")}
        tensors = {k: x for k, x in tensors.items() if "x.weight" not in k}
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_peft_adapter(tmp_path, models["llama"].params, models["llama"].config)


def test_another_number_of_labels_is_an_error(models, tmp_path):
    theirs = write_theirs(tmp_path, "bert")
    model = models["bert"]
    head = {"kernel": jnp.zeros((32, 2)), "bias": jnp.zeros(2)}
    config = dataclasses.replace(model.config, num_labels=2)
    with pytest.raises(UserError, match=r"classifier.* shape \(3, 32\).* \(2, 32\)"):
        load_peft_adapter(theirs, {**model.params, "classifier": head}, config)


def test_integer_tensors_are_an_error(models, tmp_path):
    theirs = write_theirs(tmp_path, "llama", np.int8)
    with pytest.raises(UserError, match="dtype I8; convert it to one of"):
        load_peft_adapter(theirs, models["llama"].params, models["llama"].config)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(models, tmp_path, file):
    (write_theirs(tmp_path, "llama") / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        load_peft_adapter(tmp_path, models["llama"].params, models["llama"].config)
