"""Which axes form a matrix: what names, boxes and neighbours say, on real layouts."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers

pytestmark = pytest.mark.usefixtures("fast_compilation")

D, L, N, K, H, F, V, E = 48, 3, 4, 2, 16, 96, 256, 6


def _shapes(layout):
    """Returns a tree of shapes from {key path: shape}, its keys joined by slashes."""
    tree = {}
    for path, shape in layout.items():
        *modules, last = path.split("/")
        node = functools.reduce(lambda x, key: x.setdefault(key, {}), modules, tree)
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def _matrices(params, **options):
    """Returns what is projected of each leaf: ((stack), rows, columns), or None."""
    numbers = None
    if options:
        numbers = functools.partial(lowrank_optax.dimension_numbers_by_name, **options)
    plans = lowrank_optax.projections(
        lowrank_optax.galore(0.1, rank=1, dimension_numbers=numbers), params
    )
    return {
        path.replace("']['", "/").strip("[']"): plan.is_projected
        and (plan.view.stack, plan.view.rows, plan.view.columns)
        for path, plan in plans.items()
    }


# Path -> shape, (stack, rows, columns) or False. Of Tunix: Qwen 3, Llama 3.
HEADS_AFTER_INPUT = {
    "embedder/input_embedding": ((V, D), ((), V, D)),
    "layers/0/attn/q_proj/w": ((D, N, H), ((), D, N * H)),
    "layers/0/attn/k_proj/w": ((D, K, H), ((), D, K * H)),
    "layers/0/attn/v_proj/w": ((D, K, H), ((), D, K * H)),
    "layers/0/attn/o_proj/w": ((N, H, D), ((), N * H, D)),
    "layers/0/attn/q_norm/w": ((H,), False),
    "layers/0/input_layernorm/w": ((D,), False),
    "layers/0/mlp/gate_proj/kernel": ((D, F), ((), D, F)),
    "layers/1/mlp/router/kernel": ((D, E), ((), D, E)),
    "layers/1/mlp/gate_proj": ((E, D, F), ((E,), D, F)),
    "layers/1/mlp/down_proj": ((E, F, D), ((E,), F, D)),
    "final_norm/w": ((D,), False),
    "lm_head/w": ((D, V), ((), D, V)),
}
# Of Gemma, in Tunix and in its own library.
HEADS_BEFORE_INPUT = {
    "layers/0/attn/q_einsum/w": ((N, D, H), ((), D, N * H)),
    "layers/0/attn/kv_einsum/w": ((2, K, D, H), ((2,), D, K * H)),
    "layers/0/attn/attn_vec_einsum/w": ((N, H, D), ((), N * H, D)),
    "layers/1/attn/qkv_einsum/w": ((3, N, D, H), ((3,), D, N * H)),
    "layers/1/attn/attn_vec_einsum/w": ((N, H, D), ((), N * H, D)),
}
LINEN = {
    "block/MultiHeadDotProductAttention_0/query/kernel": ((D, N, H), ((), D, N * H)),
    "block/MultiHeadDotProductAttention_0/query/bias": ((N, H), False),
    "block/MultiHeadDotProductAttention_0/key/kernel": ((D, N, H), ((), D, N * H)),
    "block/MultiHeadDotProductAttention_0/out/kernel": ((N, H, D), ((), N * H, D)),
    "block/MultiHeadDotProductAttention_0/out/bias": ((D,), False),
    "block/Dense_0/kernel": ((D, F), ((), D, F)),
    "block/LayerNorm_0/scale": ((D,), False),
    "Conv_0/kernel": ((3, 5, D, F), ((), 15 * D, F)),
    "Conv_0/bias": ((F,), False),
}
# Scanned by Linen over axis 0, and by MaxText over axis 1.
SCANNED_FIRST = {
    "layers/attention/query/kernel": ((L, D, N, H), ((L,), D, N * H)),
    "layers/attention/query/bias": ((L, N, H), False),
    "layers/attention/out/kernel": ((L, N, H, D), ((L,), N * H, D)),
    "layers/mlp/wi/kernel": ((L, D, F), ((L,), D, F)),
    "layers/mlp/wo/kernel": ((L, F, D), ((L,), F, D)),
    "layers/norm/scale": ((L, D), False),
    "embed/embedding": ((V, D), ((), V, D)),
}
MAXTEXT = {
    "decoder/layers/self_attention/query/kernel": ((D, L, N, H), ((L,), D, N * H)),
    "decoder/layers/self_attention/key/kernel": ((D, L, K, H), ((L,), D, K * H)),
    "decoder/layers/self_attention/out/kernel": ((N, L, H, D), ((L,), N * H, D)),
    "decoder/layers/mlp/wi_0/kernel": ((D, L, F), ((L,), D, F)),
    "decoder/layers/mlp/wo/kernel": ((F, L, D), ((L,), F, D)),
    "decoder/layers/MoeBlock_0/gate/kernel": ((D, L, E), ((L,), D, E)),
    "decoder/layers/MoeBlock_0/wi_0": ((E, L, D, F), ((E, L), D, F)),
    "decoder/layers/MoeBlock_0/wo": ((E, L, F, D), ((E, L), F, D)),
    "decoder/layers/pre_self_attention_layer_norm/scale": ((D, L), False),
    "decoder/decoder_norm/scale": ((D,), False),
    "decoder/logits_dense/kernel": ((D, V), ((), D, V)),
    "token_embedder/embedding": ((V, D), ((), V, D)),
}
PIPELINE = {
    "stages/layers/attention/query/kernel": ((2, L, D, N, H), ((2, L), D, N * H)),
    "stages/layers/mlp/up/kernel": ((2, L, D, F), ((2, L), D, F)),
    "stages/layers/mlp/down/kernel": ((2, L, F, D), ((2, L), F, D)),
    "stages/layers/norm/scale": ((2, L, D), False),
}
WIDE_HEADS = {
    "attn/q_proj/w": ((16, N, 32), ((), 16, N * 32)),
    "attn/o_proj/w": ((N, 32, 16), ((), N * 32, 16)),
}
# All begin with the axes of the norm.
INPUTS_ALONE = {
    "layers/up/kernel": ((D, L, F), ((L,), D, F)),
    "layers/norm/scale": ((D, L), False),
}
SCALARS = {
    "attn/q": ((D, N, H), ((), D, N * H)),
    "attn/k": ((D, N, H), ((), D, N * H)),
    "attn/out": ((), False),
    "attn/value/scale": ((), False),
}
FUSED = {
    "self_attention/qkv_proj/kernel": ((D, 3, N, H), ((3,), D, N * H)),
    "self_attention/out/kernel": ((N, H, D), ((), N * H, D)),
}
HAIKU = {
    "transformer/~/multi_head_attention/query/w": ((L, D, D), ((L,), D, D)),
    "transformer/~/multi_head_attention/query/b": ((L, D), False),
    "transformer/~/multi_head_attention/linear/w": ((L, D, D), ((L,), D, D)),
    "transformer/~/layer_norm/scale": ((L, D), False),
    "transformer/~/layer_norm/offset": ((L, D), False),
    "conv1_d/w": ((3, D, F), ((), 3 * D, F)),
    "linear/w": ((D, V), ((), D, V)),
}
EQUINOX = {
    "blocks/attn/query_proj/weight": ((L, D, D), ((L,), D, D)),
    "blocks/attn/output_proj/weight": ((L, D, D), ((L,), D, D)),
    "blocks/norm/weight": ((L, D), False),
    "blocks/mlp/layers/0/weight": ((L, F, D), ((L,), D, F)),
    # A table of tokens begins with its input.
    "embedding/weight": ((V, D), ((), V, D)),
    "blocks/mlp/layers/0/bias": ((L, F), False),
    "conv/weight": ((F, D, 3), ((), 3 * D, F)),
    "patch_embedding/conv/weight": ((F, D, 3), ((), 3 * D, F)),
    "conv/bias": ((F, 1), False),
}
# Not one name of attention, norms or convolutions: the last two axes.
UNKNOWN = {
    "a": ((8, 9), ((), 8, 9)),
    "b": ((9, 8), ((), 9, 8)),
    "stacked": ((5, 8, 9), ((5,), 8, 9)),
    "other/key": ((5, 8, 9), ((5,), 8, 9)),
}
LAYOUTS = {
    "heads after the input": HEADS_AFTER_INPUT,
    "heads before the input": HEADS_BEFORE_INPUT,
    "linen": LINEN,
    "scanned first": SCANNED_FIRST,
    "maxtext": MAXTEXT,
    "pipeline": PIPELINE,
    "fused": FUSED,
    "scalars": SCALARS,
    "inputs alone": INPUTS_ALONE,
    "wide heads": WIDE_HEADS,
    "haiku": HAIKU,
    "equinox": EQUINOX,
    "unknown": UNKNOWN,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_hidden_matrix_is_the_one_that_is_meant(name):
    layout = LAYOUTS[name]
    params = _shapes({path: shape for path, (shape, _) in layout.items()})
    expected = {path: matrix for path, (_, matrix) in layout.items()}
    assert _matrices(params) == expected


@pytest.mark.parametrize("name", ["maxtext", "scanned first"])
def test_what_a_partition_leaves_of_a_model_shows_its_layers_too(name):
    # Norms, embedding and head are another optimizer's.
    layout = {
        path: entry
        for path, entry in LAYOUTS[name].items()
        if entry[1] and V not in entry[0]
    }
    params = _shapes({path: shape for path, (shape, _) in layout.items()})
    assert _matrices(params) == {path: m for path, (_, m) in layout.items()}


# Layers on axis 1, without a norm, and with as many heads as layers.
ALIKE = {
    "trunk/attention/query/kernel": (D, L, L, H),
    "trunk/attention/out/kernel": (L, L, H, D),
    "trunk/top/kernel": (D, L, F),
}


@pytest.mark.parametrize(
    "scan_axis", [{r"\['trunk'\]": 1}, {"top": -2, "attention": 1}]
)
def test_scan_axis_says_where_layers_are(scan_axis):
    assert _matrices(_shapes(ALIKE), scan_axis=scan_axis) == {
        "trunk/attention/query/kernel": ((L,), D, L * H),
        "trunk/attention/out/kernel": ((L,), L * H, D),
        "trunk/top/kernel": ((L,), D, F),
    }


def test_scan_axis_as_a_number_is_that_of_what_is_named_after_layers():
    layout = {"layers/up": (D, L, F), "layers/scale": (D, L), "head": (D, L, F)}
    assert _matrices(_shapes(layout), scan_axis=1) == {
        "layers/up": ((L,), D, F),
        "layers/scale": False,
        "head": ((D,), L, F),
    }


@pytest.mark.parametrize(
    ("layout", "scan_axis", "message"),
    [
        ({"layers/up": (D, F)}, 2, r"scan_axis 2: \['layers'\]\['up'\] has 2 axes"),
        (
            {"layers/up": (D, L, F), "blocks/up": (D, 5, F)},
            1,
            r"\['blocks'\]\['up'\] has 5 layers there, \['layers'\]\['up'\] has 3;",
        ),
        ({"up": (D, L, F)}, 1, "no leaf's key path has a word like layers or blocks"),
        ({"up": (D, L, F)}, {"down": 1}, "no leaf's key path has 'down'"),
    ],
)
def test_a_scan_axis_that_cannot_be_meant_raises(layout, scan_axis, message):
    with pytest.raises(ValueError, match=message):
        _matrices(_shapes(layout), scan_axis=scan_axis)


class _Box(NamedTuple):
    """Names of axes -> the matrix that they are."""

    names: tuple
    shape: tuple
    matrix: tuple | bool


BOXES = {
    "heads": _Box(("embed", "heads", "kv"), (D, N, H), ((), D, N * H)),
    "outputs": _Box(("heads", "kv", "embed"), (N, H, D), ((), N * H, D)),
    "layers": _Box(("embed", "layers", "mlp"), (D, L, F), ((L,), D, F)),
    "experts": _Box(("exp", "embed", "mlp"), (E, D, F), ((E,), D, F)),
    "router": _Box(("embed", "exp"), (D, E), ((), D, E)),
    "vectors": _Box(("layers", "embed"), (L, D), False),
    "latent": _Box(("q_lora", "q_heads", "kv"), (D, N, H), ((), D, N * H)),
    "mesh": _Box(("expert", "fsdp", "tensor"), (E, D, F), ((E,), D, F)),
    "grouped": _Box(
        ("kv_head", "q_heads_per_group", "head_size", "embed"),
        (K, 2, H, D),
        ((), K * 2 * H, D),
    ),
}


def _boxed_by_linen(names, leaf):
    return pytest.importorskip("flax.linen").LogicallyPartitioned(leaf, names)


def _boxed_by_nnx(names, leaf):
    return pytest.importorskip("flax.nnx").Param(
        leaf, out_sharding=names, eager_sharding=False
    )


@pytest.mark.parametrize("boxed", [_boxed_by_linen, _boxed_by_nnx])
def test_names_of_axes_say_more_than_those_of_leaves(boxed):
    params = {key: boxed(box.names, jnp.ones(box.shape)) for key, box in BOXES.items()}
    assert _matrices(params) == {key: box.matrix for key, box in BOXES.items()}
    # What init has read, an update reads again, in the boxes of what it is given.
    tx = lowrank_optax.galore(0.1, rank=2)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_muons_dimension_numbers_are_taken_as_they_are():
    muon = optax.contrib.MuonDimensionNumbers
    params = _shapes({"q": (D, N, H), "b": (D, F), "v": (L, D)})
    numbers = {"q": muon(0, (1, 2)), "b": muon(-2, -1), "v": None}
    own = {"q": LowRankDimensionNumbers(0, (1, 2)), "b": muon(), "v": None}
    for tree in (numbers, lambda _: numbers, own):
        tx = lowrank_optax.galore(0.1, rank=1, dimension_numbers=tree)
        plans = lowrank_optax.projections(tx, params)
        assert (plans["['q']"].view.rows, plans["['q']"].view.columns) == (D, N * H)
        assert plans["['b']"].is_projected
        assert plans["['v']"].reason == "its dimension numbers are None"


class Module(NamedTuple):
    """A module that can be called, as those of Equinox."""

    weight: object

    def __call__(self, x):
        raise AssertionError("the tree was called as a function")


@pytest.mark.parametrize("numbers", [LowRankDimensionNumbers(), None])
def test_a_tree_that_can_be_called_is_a_tree(numbers):
    tx = lowrank_optax.galore(0.1, rank=1, dimension_numbers=Module(numbers))
    (plan,) = lowrank_optax.projections(tx, Module(jnp.ones((D, F)))).values()
    assert plan.is_projected == (numbers is not None)


@pytest.mark.parametrize("method", ["galore", "low_rank_muon"])
def test_who_projects_under_half_is_warned_by_init_alone(method):
    params = {"narrow": jnp.ones((D, 8)), "w": jnp.ones((16, 16))}
    tx = getattr(lowrank_optax, method)(0.1, rank=8)
    with pytest.warns(UserWarning, match="only 40% of the entries of 2") as found:
        state = tx.init(params)
    assert "the largest of the rest: ['narrow'] 48x8: full size, short side" in str(
        found[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Who asks is answered, and an update has nothing new to say.
        lowrank_optax.projections(tx, params)
        tx.update(params, state, params)
        tx.init({"w": params["w"], "bias": jnp.ones(1000)})


@pytest.mark.parametrize("method", ["sumo", "low_rank_muon"])
def test_muon_at_full_size_takes_the_matrix_that_is_meant(method):
    # The rank is above the short side: nothing is projected.
    draws = jax.random.normal(jax.random.key(0), (D, N, H))
    scale = jax.random.normal(jax.random.key(1), (L, D))
    params = {"attention": {"query": draws, "key": draws}, "norm": {"scale": scale}}
    tx = getattr(lowrank_optax, f"scale_by_{method}")(rank=64)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    flat = {"q": draws.reshape(D, N * H)}
    expected, _ = tx.update(flat, tx.init(flat), flat)
    # The same products of other shapes round otherwise: five steps of 1e-7.
    assert jnp.allclose(
        updates["attention"]["query"].reshape(D, N * H), expected["q"], atol=1e-5
    )
    # What is no matrix has Adam, whose first step is the sign.
    assert jnp.allclose(updates["norm"]["scale"], jnp.sign(scale), atol=1e-6)
