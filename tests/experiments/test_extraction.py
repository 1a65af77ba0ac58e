"""The adapter of a fine-tuned model: what it has, and what it says it lacks."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.model.adapters import block_matrices, merged
from experiments.model.encoder import init_encoder
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.extraction import extract, left_out
from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig
from experiments.tuning.config import unused
from experiments.tuning.flags import TuningConfig

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
}
ENCODER = EncoderConfig(kind="bert", **SIZES, num_heads=2, num_labels=2)
LLAMA = LlamaConfig(**SIZES, num_heads=2, num_kv_heads=2)
INIT = {
    "encoder": lambda: init_encoder(ENCODER, jax.random.key(0)),
    "llama": lambda: init_params(LLAMA, jax.random.key(0)),
}
# What is neither a block matrix nor saved as a whole.
LEFT_OUT = {
    "encoder": {
        *("embeddings.word", "embeddings.position", "embeddings.segment"),
        *("embeddings.norm.scale", "embeddings.norm.bias"),
        *(f"blocks.attention_norm.{name}" for name in ("scale", "bias")),
        *(f"blocks.mlp_norm.{name}" for name in ("scale", "bias")),
        *(f"blocks.mlp.{name}.bias" for name in ("up", "down")),
        *(
            f"blocks.attention.{name}.bias"
            for name in ("query", "key", "value", "output")
        ),
    },
    "llama": {
        *("embedding", "head", "norm", "blocks.attention_norm", "blocks.mlp_norm"),
    },
}


def drawn(name, seed):
    shapes = jax.eval_shape(INIT[name])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
    )


BEFORE = {name: drawn(name, 0) for name in INIT}
# Every parameter changes.
AFTER = {
    name: jax.tree.map(lambda x, y: x + 0.1 * y, BEFORE[name], drawn(name, 1))
    for name in INIT
}


@pytest.mark.parametrize("name", INIT)
def test_block_matrices_have_adapters_and_the_rest_is_named(name):
    found = extract(AFTER[name], BEFORE[name], rank=8)

    wanted = block_matrices(BEFORE[name]).keys() - {"pooler.kernel"}
    assert found.params["adapters"].keys() == wanted
    assert found.ranks.keys() == found.errors.keys() == wanted
    assert set(found.left_out) == LEFT_OUT[name]
    for ranks, errors in zip(found.ranks.values(), found.errors.values(), strict=True):
        assert ranks.tolist() == [8, 8]
        assert np.all((errors > 0.1) & (errors < 1))


@pytest.mark.parametrize("name", INIT)
def test_at_full_rank_the_adapter_is_the_model_but_for_what_is_left_out(name):
    found = extract(AFTER[name], BEFORE[name], energy=1.0)

    model = merged(found.params)
    for path, leaf in jax.tree.leaves_with_path(model):
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        source = BEFORE if key in LEFT_OUT[name] else AFTER
        wanted = source[name]
        for entry in path:
            wanted = wanted[entry.key]
        np.testing.assert_allclose(leaf, wanted, atol=1e-5, err_msg=key)


def test_the_table_names_errors_bytes_and_what_is_left_out():
    found = extract(AFTER["encoder"], BEFORE["encoder"], rank=8)

    # Rank 8 of (16, 16) four times and of (16, 24) twice, in two layers; float32.
    factors = 2 * 8 * (4 * 32 + 2 * 40)
    whole = 16 * 16 + 16 + 16 * 2 + 2
    assert found.adapter_bytes == 4 * (factors + whole)
    leaves = jax.tree.leaves(BEFORE["encoder"])
    assert found.weight_bytes == 4 * sum(x.size for x in leaves)
    lines = str(found).splitlines()
    assert lines[0].split() == ["matrix", "rank", "relative", "error"]
    error = found.errors["blocks.mlp.up.kernel"]
    (line,) = (line for line in lines if line.startswith("blocks.mlp.up.kernel"))
    assert line.split()[1:] == ["8", f"{error.min():.3f}", "to", f"{error.max():.3f}"]
    share = found.adapter_bytes / found.weight_bytes
    assert f"{share:.1%} of the model's" in lines[-2]
    assert lines[-1].startswith("changed, and not in the adapter: ")
    assert "embeddings.word" in lines[-1]
    assert json.loads(json.dumps(found.to_dict()))["adapter_bytes"] > 0


def test_what_trained_beside_adapters_is_named():
    before, after = BEFORE["encoder"], AFTER["encoder"]
    whole = {k: after[k] for k in ("classifier", "pooler")}
    tuned = {**before, **whole, "embeddings": after["embeddings"]}
    tuned["blocks"] = {**before["blocks"], "mlp": after["blocks"]["mlp"]}
    adapters = ["blocks.mlp.up.kernel", "blocks.mlp.up.bias", "blocks.mlp.down.kernel"]
    assert set(left_out(tuned, before, adapters)) == {
        "blocks.mlp.down.bias",
        *("embeddings.word", "embeddings.position", "embeddings.segment"),
        *("embeddings.norm.scale", "embeddings.norm.bias"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, r"rank 17 does not fit .*; give a rank from 1 to 16"),
        ({"rank": 0}, "rank 0 does not fit"),
        ({"energy": 1.5}, r"energy is 1.5; give a share in \(0, 1\]"),
    ],
)
def test_what_is_out_of_range_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        extract(AFTER["encoder"], BEFORE["encoder"], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "is_refused"),
    [("galore", False), ("relora", False), ("lora", True), ("low_rank", True)],
)
def test_what_has_no_change_of_the_matrices_saves_no_adapter(optimizer, is_refused):
    config = TuningConfig(optimizer=optimizer, save_adapter=4)
    assert ("save_adapter" in unused(config)) == is_refused


def test_a_change_that_is_not_finite_is_one_line():
    broken = {
        **AFTER["llama"],
        "blocks": jax.tree.map(np.copy, AFTER["llama"]["blocks"]),
    }
    broken["blocks"]["mlp"]["up"][1] = np.nan
    with pytest.raises(UserError, match=r"\['up'\]: the change is not finite"):
        extract(broken, BEFORE["llama"], rank=2)
