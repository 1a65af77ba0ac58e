"""Layers apart: the same model, with an optimizer's state for each layer's matrix."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax
from experiments import evaluate
from experiments.model.adapters import merged
from experiments.model.encoder import apply_encoder, init_encoder
from experiments.model.encoder_files import load_encoder
from experiments.model.hugging_face import load_llama
from experiments.model.layers import apart, are_apart, by_kind, together
from experiments.model.llama import apply, init_params
from experiments.optim.compaction import LOOKS
from experiments.run.columns import capacities_line, ranks_by_name
from tests.experiments import small_tuning
from tests.experiments.small_runs import (
    MODEL,
    assert_same_run,
    one_error_line,
    read_lines,
    read_state,
    run,
)
from tests.experiments.small_tuning import tune

pytestmark = pytest.mark.usefixtures("one_device", "fast_compilation")
TOKENS = np.arange(24).reshape(3, 8) % 30


@pytest.fixture(scope="module")
def llama():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def flags(tmp_path_factory, inputs):
    del inputs
    return small_tuning.write_inputs(tmp_path_factory.mktemp("tuning"))


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_stack_taken_apart_is_put_together_again(llama):
    layers = apart(llama)
    assert (are_apart(llama), are_apart(layers)) == (False, True)
    assert together(llama) is llama
    assert_same_bits(together(layers), llama)
    assert_same_bits(merged(layers), llama)
    third = layers["blocks"]["1"]["mlp"]["up"]
    np.testing.assert_array_equal(third, llama["blocks"]["mlp"]["up"][1])


@pytest.mark.parametrize("remat", [False, True])
def test_a_llama_of_layers_apart_is_that_of_stacks(llama, remat):
    config = dataclasses.replace(MODEL, remat=remat)

    def loss(params):
        return jnp.var(apply(config, params, TOKENS))

    found, gradients = jax.value_and_grad(loss)(apart(llama))
    expected, stacked = jax.value_and_grad(loss)(llama)
    # Other programs order the sums otherwise.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(stacked))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest),
        together(gradients),
        stacked,
    )


def test_an_encoder_of_layers_apart_drops_out_as_that_of_stacks():
    config = small_tuning.MODEL
    params = init_encoder(config, jax.random.key(1))
    mask, key = np.ones(TOKENS.shape, bool), jax.random.key(2)

    def logits(params, key):
        return apply_encoder(config, params, TOKENS, mask, None, key)

    dropped = logits(params, key)
    assert jnp.any(jnp.abs(dropped - logits(params, None)) > 1e-4)
    np.testing.assert_allclose(logits(apart(params), key), dropped, atol=1e-6)


def test_layers_follow_their_numbers():
    named = {f"blocks/{i}/mlp/up": i for i in (0, 1, 10, 11, 2, 3)} | {"pooler": 7}
    assert by_kind(named) == {"blocks/mlp/up": [0, 1, 2, 3, 10, 11], "pooler": 7}


@pytest.mark.slow
def test_a_run_frees_columns_by_layer_and_is_resumed(flags, tmp_path, die_at):
    """The same losses as in stacks, until the first columns are freed, and after it."""
    more = ["--threshold", 0.5, "--rank-smoothing", 0, "--min-rank", 1]
    more += ["--min-refresh-interval", 1, "--max-refresh-interval", 1]
    more += ["--compact-every", 1, "--checkpoint-every", 4, "--steps", 6]
    more += ["--save-weights", "--save-adapter", 4]
    apart_ = [*flags, *more, "--no-scan-layers"]
    assert tune(*flags, *more, "--out", tmp_path / "stacks") == 0
    assert tune(*apart_, "--out", tmp_path / "apart") == 0

    stacks, layers = (read_lines(tmp_path / name) for name in ("stacks", "apart"))
    assert any("ranks" in line for line in layers)
    for one, other in zip(stacks, layers, strict=True):
        assert other.keys() == one.keys()
        for name in {"loss", "validation_loss"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-4)
        assert other.get("ranks") == one.get("ranks")
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("stacks", "apart")
    ]
    for name in ("effective_rank", "rank_reduction"):
        assert summaries[1][name] == pytest.approx(summaries[0][name], rel=1e-6)
    assert summaries[1]["block_state_bytes"] < summaries[0]["block_state_bytes"]
    assert summaries[1]["compactions"][0]["step"] == LOOKS
    last = read_state(tmp_path / "apart", 6)
    columns = {
        layer: [
            value.shape[-1]
            for name, value in last.items()
            if f"['{layer}']" in name and "basis" in name
        ]
        for layer in "01"
    }
    assert columns["0"] != columns["1"]

    with pytest.raises(die_at(5)):
        tune(*apart_, "--out", tmp_path / "halves")
    die_at(None)
    assert tune("--out", tmp_path / "halves", "--resume") == 0
    assert_same_run(tmp_path / "apart", tmp_path / "halves", 6)

    _, loaded = load_encoder(tmp_path / "apart/weights", None, jax.random.key(0))
    trained = {k: x for k, x in last.items() if k.startswith("['params']")}
    for path, leaf in jax.tree.leaves_with_path({"params": apart(loaded)}):
        np.testing.assert_array_equal(leaf, trained[jax.tree_util.keystr(path)])
    for name in ("rank_by_layer.png", "memory.png", "first_spectra.png"):
        assert (tmp_path / "apart/figures" / name).stat().st_size > 0


def test_pre_training_is_evaluated_and_written_in_stacks(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*inputs, "--optimizer", "galore", "--rank", 2, "--no-scan-layers"]
    words += ["--gradients", "full", "--save-weights"]
    assert run(*words, "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert evaluate.main([str(out), "--tokens", "100"]) == 0
    assert f"{summary['validation_loss']:.4f}" in capsys.readouterr().out
    trained = read_state(out, 4)
    assert "['params']['blocks']['1']['mlp']['up']" in trained
    _, params = load_llama(out / "weights")
    np.testing.assert_array_equal(
        params["blocks"]["mlp"]["up"][1],
        trained["['params']['blocks']['1']['mlp']['up']"],
    )


def test_adapters_have_no_layers_apart(flags, tmp_path, capsys):
    words = ["--optimizer", "lora", "--no-scan-layers", "--out", tmp_path / "out"]
    assert tune(*flags, *words) == 2
    assert "--scan-layers has no effect: lora has adapters" in one_error_line(capsys)


def test_names_of_columns_have_a_range_for_each_kind_of_matrix():
    params = {"blocks": {str(i): {"up": jnp.zeros((8, 9))} for i in range(2)}}
    state = lowrank_optax.galore(0.1, 4).init(params)
    state = lowrank_optax.resize(state, {"['blocks']['0']['up']": 5})
    assert capacities_line(state) == "blocks/up 4 to 5"
    assert ranks_by_name(state) == {"blocks/up": [4, 4]}
