"""``by_role``: who trains which leaf, listed, overridden, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import by_role, roles
from lowrank_optax.matrix.boxes import unboxed

V, D, F, L = 50, 16, 64, 3
# Role by path, and shape. Names of Hugging Face's LLaMA, MaxText, Keras, GPT-2, Gemma.
MODELS = {
    "llama": {
        "model/embed_tokens/weight": ((V, D), "vocabulary"),
        "model/layers/0/self_attn/q_proj/weight": ((D, D), "hidden"),
        "model/layers/0/mlp/gate_proj/weight": ((F, D), "hidden"),
        "model/layers/0/input_layernorm/weight": ((D,), "vectors"),
        "lm_head/weight": ((V, D), "vocabulary"),
    },
    "maxtext": {
        "token_embedder/embedding": ((V, D), "vocabulary"),
        "decoder/layers/self_attention/query/kernel": ((D, L, 2, 8), "hidden"),
        "decoder/layers/mlp/wi_0/kernel": ((D, L, F), "hidden"),
        "decoder/layers/mlp/wo/kernel": ((F, L, D), "hidden"),
        "decoder/layers/norm/scale": ((D, L), "vectors"),
        "decoder/logits_dense/kernel": ((D, V), "vocabulary"),
    },
    "linen": {
        "Embed_0/embedding": ((V, D), "vocabulary"),
        "MultiHeadDotProductAttention_0/query/kernel": ((D, 2, 8), "hidden"),
        "MultiHeadDotProductAttention_0/query/bias": ((2, 8), "vectors"),
        "Dense_0/kernel": ((D, F), "hidden"),
        # Nothing but its shape says what this is.
        "Dense_1/kernel": ((D, V), "vocabulary"),
        "Dense_1/bias": ((V,), "vectors"),
    },
    "gpt2": {
        "wte": ((V, D), "vocabulary"),
        "wpe": ((12, D), "vocabulary"),
        "h/0/attn/c_attn/kernel": ((D, 3 * D), "hidden"),
        "h/0/ln_1/scale": ((D,), "vectors"),
        "temperature": ((), "vectors"),
    },
    "gemma": {
        "embedder/input_embedding": ((V, D), "vocabulary"),
        "layers/0/attn/kv_einsum/w": ((2, 2, D, 8), "hidden"),
        "layers/0/moe/router/kernel": ((D, 4), "hidden"),
        "layers/0/moe/experts/up": ((4, D, F), "hidden"),
    },
    "a_head_with_a_name_is_the_only_one": {
        "embed": ((F, 4), "vocabulary"),
        "up": ((4, F), "hidden"),
        "down": ((F, D), "hidden"),
        "head": ((D, F), "vocabulary"),
    },
    "an encoder that is called embedder": {
        "text_embedder/embeddings/word_embeddings/embedding": ((V, D), "vocabulary"),
        "text_embedder/encoder/layers/0/mlp/up/kernel": ((D, F), "hidden"),
        "text_embedder/encoder/layers/0/norm/scale": ((D,), "vectors"),
        "head/dense/kernel": ((D, 3), "vocabulary"),
    },
    "two_of_the_lengths_leave_doubt": {
        "embed": ((F, D), "vocabulary"),
        "up": ((D, F), "hidden"),
        "down": ((F, D), "hidden"),
    },
}


def tree_of(entries):
    """Returns a nested dictionary from one by paths with slashes."""
    tree = {}
    for path, entry in entries.items():
        *modules, last = path.split("/")
        functools.reduce(lambda x, k: x.setdefault(k, {}), modules, tree)[last] = entry
    return tree


def arrays(name="llama"):
    # By NumPy, which compiles nothing.
    rng = np.random.default_rng(0)
    return tree_of(
        {
            path: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for path, (shape, _) in MODELS[name].items()
        }
    )


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_read_from_names_and_shapes(name):
    expected = tree_of({path: role for path, (_, role) in MODELS[name].items()})
    assert roles(arrays(name)) == expected


def test_an_axis_named_vocab_tells():
    linen = pytest.importorskip("flax.linen")
    params = {
        "x": linen.Partitioned(jnp.ones((V, D)), ("vocab", "embed")),
        "y": linen.Partitioned(jnp.ones((D, F)), ("embed", "mlp")),
    }
    assert roles(params) == {"x": "vocabulary", "y": "hidden"}


def test_integers_are_frozen():
    params = {"up": jnp.ones((D, F)), "count": jnp.arange(3)}
    assert roles(params) == {"up": "hidden", "count": "frozen"}


def test_an_update_is_that_of_the_optimizer_of_each_role():
    params, grads = arrays(), jax.tree.map(jnp.cos, arrays())
    rates = {"vocabulary": 0.3, "vectors": lambda count: 0.1}
    hidden = lowrank_optax.galore(0.02, rank=4)
    optimizer = by_role(hidden, **rates, patterns={"q_proj": "frozen"})
    got, _ = optimizer.update(grads, optimizer.init(params), params)

    def alone(name, transformation):
        one = {name: params[name]}
        updates, _ = transformation.update(
            {name: grads[name]}, transformation.init(one), one
        )
        return updates[name]

    for tree in (params, grads):
        tree.update(tree.pop("model"))
    layer = got["model"]["layers"]["0"]
    for found, wanted in [
        (got["lm_head"], alone("lm_head", optax.adamw(0.3))),
        (got["model"]["embed_tokens"], alone("embed_tokens", optax.adamw(0.3))),
        (
            layer["input_layernorm"],
            alone("layers", optax.adamw(0.1))["0"]["input_layernorm"],
        ),
    ]:
        # The same operations: rounding alone may differ.
        np.testing.assert_allclose(found["weight"], wanted["weight"], rtol=1e-6)
    assert not jnp.any(layer["self_attn"]["q_proj"]["weight"])
    # The sketch depends on the path.
    gate = layer["mlp"]["gate_proj"]["weight"]
    assert np.linalg.matrix_rank(gate) == 4


def test_vectors_are_trained_as_the_vocabulary_is_by_default():
    params = arrays()
    one = by_role(optax.sgd(0.1), 0.3)
    other = by_role(optax.sgd(0.1), 0.3, optax.adamw(0.3))
    grads = jax.tree.map(jnp.cos, params)
    got, wanted = (tx.update(grads, tx.init(params), params)[0] for tx in (one, other))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_projections_lists_the_roles_and_where_they_come_from():
    optimizer = by_role(
        lowrank_optax.galore(0.1, rank=4), 0.3, patterns={"layernorm": "frozen"}
    )
    listed = [str(x) for x in lowrank_optax.projections(optimizer, arrays()).values()]
    elsewhere = "full size, with another optimizer"
    assert listed == [
        f"['lm_head']['weight'] 50x16: vocabulary (by its name), {elsewhere}",
        "['model']['embed_tokens']['weight'] 50x16: vocabulary (by its name), "
        + elsewhere,
        "['model']['layers']['0']['input_layernorm']['weight'] 16: "
        "frozen (pattern 'layernorm'), full size, not trained",
        "['model']['layers']['0']['mlp']['gate_proj']['weight'] 64x16: "
        "hidden (a matrix), (16 x 64), axes (1) x (0), rows projected, 16 -> 4",
        "['model']['layers']['0']['self_attn']['q_proj']['weight'] 16x16: "
        "hidden (a matrix), (16 x 16), axes (1) x (0), columns projected, 16 -> 4",
    ]


# Neighbours tell the axis of layers: both other leaves of the scan are vectors.
SCANNED = {
    "layers": {"w": jnp.ones((D, L, F)), "norm": {"scale": jnp.ones((D, L))}},
    "embed": jnp.ones((V, D)),
}


def test_a_matrix_is_seen_as_in_the_whole_model():
    optimizer = by_role(lowrank_optax.galore(0.1, rank=4), 0.3)
    plan = lowrank_optax.projections(optimizer, SCANNED)["['layers']['w']"]
    assert (plan.view.stack, plan.view.rows, plan.view.columns) == ((L,), D, F)
    grads = jax.tree.map(jnp.ones_like, SCANNED)
    state = optimizer.init(SCANNED)
    updates, state = optimizer.update(grads, state, SCANNED)
    assert lowrank_optax.ranks(state)["['layers']['w']"].shape == (L,)
    assert updates["layers"]["w"].shape == (D, L, F)


def _loss(params, x):
    hidden = params["model"]["embed_tokens"]["weight"][x]
    layer = params["model"]["layers"]["0"]
    hidden = hidden * layer["input_layernorm"]["weight"]
    hidden = jnp.tanh(hidden @ layer["self_attn"]["q_proj"]["weight"].T)
    hidden = (hidden @ layer["mlp"]["gate_proj"]["weight"].T)[..., :D] + hidden
    logits = hidden @ params["lm_head"]["weight"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, x))


def test_gradients_inside_the_subspaces_are_those_of_the_hidden_matrices():
    params, x = arrays(), jnp.arange(24).reshape(2, 12)
    optimizer = by_role(lowrank_optax.galore(0.02, rank=4), 0.1)
    state = optimizer.init(params)
    grads = jax.grad(_loss)(params, x)
    _, state = optimizer.update(grads, state, params)
    function = lowrank_optax.subspace_value_and_grad(_loss, optimizer)
    _, projected, _ = jax.jit(function)(params, state, x)
    layer = projected["model"]["layers"]["0"]
    gate = layer["mlp"]["gate_proj"]["weight"]
    assert isinstance(gate, lowrank_optax.Projected)
    assert gate.coordinates.shape == (F, 4)
    assert projected["lm_head"]["weight"].shape == (V, D)

    def updated(grads):
        updates, _ = optimizer.update(grads, state, params, refresh=False)
        return updates

    wanted, got = jax.jit(updated)(grads), jax.jit(updated)(projected)
    # Adam's division makes rounding of a gradient of 1e-4 visible.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6)
    jax.tree.map(close, got, wanted)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: lowrank_optax.low_bit(tx, 8, 8),
        lambda tx: lowrank_optax.accumulate(tx, every_k=2),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["low_bit", "accumulate", "chain", "apply_if_finite"],
)
def test_it_trains_inside_other_transformations(wrap):
    params, x = arrays(), jnp.arange(24).reshape(2, 12)
    optimizer = wrap(by_role(lowrank_optax.low_rank_muon(0.02, rank=4), 0.05))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(_loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    plans = lowrank_optax.projections(optimizer, params)
    assert sum(plan.is_projected for plan in plans.values()) == 2
    plan = lowrank_optax.memory_plan(optimizer, params)
    held = sum(x.nbytes for x in jax.tree.leaves(unboxed(state)))
    assert plan.optimizer_bytes == held


def test_equinox_modules_that_are_functions_are_not_called():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    optimizer = by_role(lowrank_optax.galore(0.1, rank=2), 0.1)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert jnp.any(updates.layers[0].weight)


ERRORS = {
    "no leaf": (
        {"lm_hed": "hidden"},
        r"patterns: 'lm_hed' finds no leaf; key paths are like \['lm_head'\]",
    ),
    "two roles": (
        {"gate": "vectors", "mlp": "frozen"},
        r"'gate' makes .*\['gate_proj'\]\['weight'\] vectors, and 'mlp' makes it froz",
    ),
    "other role": ({"gate": "heads"}, "must be one of hidden, vocabulary, vectors, f"),
    "not a pattern": ({"(": "hidden"}, r"'\(' is no regular expression: missing \)"),
    "not a matrix": (
        {"layernorm": "hidden"},
        r"of shape \(16,\) a hidden matrix; a matrix has two axes",
    ),
    "none hidden": (
        {"_proj": "vectors"},
        r"no leaf of 5 is a hidden matrix: \['lm_head'\]\['weight'\] vocabulary \(by",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_patterns_that_do_not_fit_are_refused(name):
    patterns, message = ERRORS[name]
    optimizer = by_role(optax.sgd(0.1), 0.1, patterns=patterns)
    with pytest.raises(ValueError, match=message):
        optimizer.init(arrays())


def test_arrays_without_names_are_refused():
    with pytest.raises(ValueError, match="no leaf has a name that tells its role"):
        by_role(optax.sgd(0.1), 0.1).init([jnp.ones((V, D)), jnp.ones((D, F))])


@pytest.mark.parametrize("part", [None, "adamw", True, {"a": 1}])
def test_what_is_no_optimizer_is_refused(part):
    with pytest.raises(TypeError, match=r"vocabulary must be an optax\.Gradient"):
        by_role(optax.sgd(0.1), part)


def test_an_update_without_parameters_is_refused():
    optimizer, params = by_role(optax.sgd(0.1), 0.1), arrays()
    with pytest.raises(ValueError, match="call update"):
        optimizer.update(params, optimizer.init(params))
