"""The models of google-tunix, shapes alone: what is listed is what is meant.

Gemma has its heads before its input, and keys and values in one leaf.
"""

import dataclasses
import importlib

import pytest

import lowrank_optax
from tests.clients.protocol import Matrices, matrices, name_of

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("tunix", reason="tunix is not installed here")

pytestmark = pytest.mark.filterwarnings("error:::lowrank_optax", "default")

LAYER = "layers/0/attn"
# Module, class, configuration -> what is listed of its attention.
MODELS = {
    "gemma": (
        ("Gemma", "gemma1p1_2b_it"),
        {
            "q_einsum/w": matrices(2048, 8 * 256),
            "kv_einsum/w": matrices(2048, 256, 2),
            "attn_vec_einsum/w": matrices(8 * 256, 2048),
        },
    ),
    "gemma3": (
        ("Gemma3", "gemma3_12b_it"),
        {
            "q_einsum/w": matrices(3840, 16 * 256),
            "kv_einsum/w": matrices(3840, 8 * 256, 2),
            "attn_vec_einsum/w": matrices(16 * 256, 3840),
            "_query_norm/scale": None,
            "_key_norm/scale": None,
        },
    ),
    "llama3": (
        ("Llama3", "llama3_70b"),
        {
            "q_proj/w": matrices(8192, 64 * 128),
            "k_proj/w": matrices(8192, 8 * 128),
            "v_proj/w": matrices(8192, 8 * 128),
            "o_proj/w": matrices(64 * 128, 8192),
        },
    ),
    "qwen2": (
        ("Qwen2", "deepseek_r1_distill_qwen_1p5b"),
        {
            "q_proj/w": matrices(1536, 12 * 128),
            "k_proj/w": matrices(1536, 2 * 128),
            "v_proj/w": matrices(1536, 2 * 128),
            "o_proj/w": matrices(12 * 128, 1536),
            "q_bias": None,
            "k_bias": None,
            "v_bias": None,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_of_a_tunix_model_is_listed_right(name):
    (kind, config), expected = MODELS[name]
    module = importlib.import_module(f"tunix.models.{name}.model")
    config = getattr(module.ModelConfig, config)()
    config = dataclasses.replace(config, num_layers=1)
    model = nnx.eval_shape(lambda: getattr(module, kind)(config, rngs=nnx.Rngs(0)))
    optimizer = lowrank_optax.galore(1e-2, rank=8)
    plans = lowrank_optax.projections(optimizer, nnx.state(model, nnx.Param))
    found = {
        name_of(path).removeprefix(f"{LAYER}/"): Matrices(
            plan.view.stack, frozenset((plan.view.rows, plan.view.columns))
        )
        if plan.is_projected
        else None
        for path, plan in plans.items()
        if name_of(path).startswith(LAYER)
    }
    assert found == expected
