"""LoRA, ReLoRA and W = A B: what a matrix counts as, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.errors import UserError
from experiments.model.adapters import (
    adapted,
    check_adapter_rank,
    has_adapters,
    merged,
    restarted,
    with_adapters,
)
from experiments.model.encoder import apply_encoder, init_encoder
from experiments.model.encoder_shape import EncoderConfig
from experiments.model.groups import parameter_groups
from experiments.model.linear import Adapted
from experiments.model.llama import apply, init_params
from experiments.optim.build import build_optimizer
from experiments.optim.options import OptimizerOptions, with_defaults
from tests.experiments.small_runs import MODEL

pytestmark = pytest.mark.usefixtures("fast_compilation")
RANK = 4
KINDS = ("lora", "relora", "low_rank")


@pytest.fixture(scope="module")
def model():
    return init_params(MODEL, jax.random.key(0))


def start(model, kind):
    return with_adapters(model, kind, RANK, jax.random.key(1))


def assert_same(actual, expected, rtol=0.0):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10),
        actual,
        expected,
    )


def test_parameters_without_adapters_are_their_own(model):
    assert not has_adapters(model)
    assert merged(model) is adapted(model) is model


@pytest.mark.parametrize("kind", ["lora", "relora"])
def test_lora_starts_as_the_model(model, kind):
    params = start(model, kind)
    assert has_adapters(params)
    assert_same(merged(params), model)
    down = params["adapters"]["blocks.mlp.up"]["down"]
    assert down.shape == (2, 16, RANK)
    # The standard deviation of 128 draws is within a fifth of its own.
    assert float(jnp.std(down)) == pytest.approx(0.25, rel=0.2)


def test_low_rank_starts_as_the_nearest_matrices_of_that_rank(model):
    params = start(model, "low_rank")
    assert isinstance(params["model"]["blocks"]["mlp"]["up"], optax.MaskedNode)
    found = merged(params)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    assert_same(found["embedding"], model["embedding"])
    for layer in range(2):
        whole = np.asarray(model["blocks"]["mlp"]["up"][layer], np.float64)
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        nearest = u[:, :RANK] * s[:RANK] @ v[:RANK]
        actual = found["blocks"]["mlp"]["up"][layer]
        # Float32 of entries of 0.02.
        np.testing.assert_allclose(actual, nearest, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_trained_and_matrices_are_not(model, kind):
    params = start(model, kind)
    options = OptimizerOptions(optimizer=kind, rank=RANK)
    filled = with_defaults(options, steps=10, hidden_size=16)
    options = OptimizerOptions(optimizer=kind, **{"rank": RANK, **filled})
    tx = build_optimizer(options, optax.constant_schedule(1e-2))
    groups = parameter_groups(params)
    adapter = groups["adapters"]["blocks.attention.key"]
    assert adapter == {"down": "blocks", "up": "blocks"}
    assert groups["model"]["embedding"] == "rest"

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * x + 1)) for x in jax.tree.leaves(merged(params)))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    trained = params
    for _ in range(2):
        trained, state = step(trained, state)
    assert_same(trained["model"]["blocks"]["mlp"], params["model"]["blocks"]["mlp"])
    for name, old in params["adapters"].items():
        assert jnp.any(trained["adapters"][name]["up"] != old["up"])
    assert jnp.any(trained["model"]["embedding"] != params["model"]["embedding"])
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim == 3)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(params["adapters"]))


def moved(params):
    """Returns parameters whose adapters are not at their start."""
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) / 8, x.dtype),
        params["adapters"],
    )
    return {**params, "adapters": adapters}


def products_of(loss, params):
    """Returns the shapes of all products of a gradient, those in loops too."""
    shapes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                shapes.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    return shapes


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_apart_are_those_of_the_sum(model, rank, dtype):
    """Apart or not: outputs and gradients are those of W + down up in float32."""
    narrow = jax.tree.map(lambda x: x.astype(dtype), model)
    params = moved(with_adapters(narrow, "lora", rank, jax.random.key(1)))
    wide = {**params, "model": jax.tree.map(lambda x: x.astype("float32"), narrow)}
    tokens = np.arange(24).reshape(3, 8) % MODEL.vocab_size

    def loss(adapters, of, params):
        return jnp.var(apply(MODEL, of({**params, "adapters": adapters}), tokens))

    value, found = jax.value_and_grad(loss)(params["adapters"], adapted, params)
    expected = jax.value_and_grad(loss)(params["adapters"], merged, wide)
    # Sums of float32 in another order; gradients are to 1e-3 of the largest.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * largest),
        found,
        expected[1],
    )


@pytest.mark.parametrize(("rank", "are_apart"), [(1, True), (RANK, False)])
def test_a_small_rank_has_no_full_gradient(model, rank, are_apart):
    params = with_adapters(model, "lora", rank, jax.random.key(1))
    kernels = {x.shape[1:] for x in params["model"]["blocks"]["mlp"].values()}
    # As many tokens as no kernel has rows or columns.
    tokens = np.arange(21).reshape(3, 7) % MODEL.vocab_size

    def full_gradients(of):
        def loss(adapters):
            return jnp.var(apply(MODEL, of({**params, "adapters": adapters}), tokens))

        return [x for x in products_of(loss, params["adapters"]) if x in kernels]

    assert full_gradients(merged)
    # A larger rank takes more operations than the gradient of a sum.
    assert bool(full_gradients(adapted)) is not are_apart


def test_small_steps_of_an_adapter_move_a_bfloat16_model(model):
    """A sum rounds them away: half the distance of two bfloat16 is 1 / 512."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    adapters = moved(start(narrow, "lora"))["adapters"]
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    adapters = {k: {**x, "up": x["up"] / 1000} for k, x in adapters.items()}
    tokens = np.arange(24).reshape(3, 8) % MODEL.vocab_size

    def moves(of, model):
        moved = apply(MODEL, of({"model": model, "adapters": adapters}), tokens)
        return moved - apply(MODEL, model, tokens)

    true = moves(merged, wide)
    # Differences of logits of 0.1 in float32, and of small ones.
    np.testing.assert_allclose(moves(adapted, narrow), true, atol=1e-7)
    assert jnp.linalg.norm(moves(merged, narrow) - true) > jnp.linalg.norm(true) / 2


def test_a_restart_keeps_the_model_and_forgets_the_moments(model):
    params = start(model, "relora")
    params["adapters"] = jax.tree.map(lambda x: x + 0.1, params["adapters"])
    state = optax.adam(1e-3).init(params)
    state = jax.tree.map(lambda x: x + 1, state)
    new, new_state = restarted(params, state, jax.random.key(2))
    assert_same(merged(new), merged(params), rtol=1e-6)
    for adapter in new["adapters"].values():
        assert not jnp.any(adapter["up"])
    mu = new_state[0].mu
    assert not any(map(jnp.any, jax.tree.leaves(mu["adapters"])))
    assert all(map(jnp.all, jax.tree.leaves(mu["model"])))
    assert new_state[0].count == 1


ENCODER = EncoderConfig(
    kind="bert",
    vocab_size=11,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
)


@pytest.fixture(scope="module")
def encoder():
    shapes = jax.eval_shape(lambda: init_encoder(ENCODER, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) / 4, x.dtype), shapes
    )


@pytest.fixture(scope="module")
def tuning(encoder):
    """The encoder at the start of fine-tuning."""
    return with_adapters(encoder, "lora", RANK, jax.random.key(1), draw="uniform")


def test_an_encoders_blocks_and_pooler_have_adapters(encoder, tuning):
    kinds = ("attention.query", "attention.key", "attention.value", "attention.output")
    stacked = {f"blocks.{kind}.kernel" for kind in (*kinds, "mlp.up", "mlp.down")}
    assert tuning["adapters"].keys() == stacked | {"pooler.kernel"}
    pooler = tuning["adapters"]["pooler.kernel"]
    assert (pooler["down"].shape, pooler["up"].shape) == ((16, RANK), (RANK, 16))
    assert_same(merged(tuning), encoder)
    groups = parameter_groups(tuning)
    assert groups["adapters"]["pooler.kernel"] == {"down": "blocks", "up": "blocks"}
    assert groups["model"]["pooler"]["kernel"] == "frozen"


def test_fine_tuning_begins_as_peft_does(tuning):
    for name, n in {"blocks.mlp.up.kernel": 16, "blocks.mlp.down.kernel": 24}.items():
        down = np.asarray(tuning["adapters"][name]["down"])
        assert not tuning["adapters"][name]["up"].any()
        # Kaiming's bound with a = sqrt(5): sqrt(6 / (1 + a^2)) / sqrt(n).
        assert 0.9 / n**0.5 < np.abs(down).max() <= 1 / n**0.5
        assert down.std() == pytest.approx(1 / (3 * n) ** 0.5, rel=0.15)


def test_the_scale_is_a_factor_of_the_adapters(encoder, tuning):
    adapters = jax.tree.map(lambda x: x + 0.1, tuning["adapters"])
    params = {**tuning, "adapters": adapters}
    once, twice = merged(params), merged(params, scale=2.0)
    for path in (("pooler",), ("blocks", "mlp", "up")):
        start, one, two = encoder, once, twice
        for name in (*path, "kernel"):
            start, one, two = start[name], one[name], two[name]
        assert jnp.any(one != start)
        np.testing.assert_allclose(two - start, 2 * (one - start), atol=1e-6)
    state = optax.adam(1e-3).init(params)
    new, _ = restarted(params, state, jax.random.key(2), scale=2.0)
    assert_same(merged(new, scale=2.0), twice, rtol=1e-6)


def test_an_encoders_products_apart_are_those_of_the_sum(encoder):
    params = moved(with_adapters(encoder, "lora", 1, jax.random.key(1)))
    tokens = np.arange(10).reshape(2, 5)
    mask, segments = np.ones((2, 5), bool), np.zeros((2, 5), np.int32)
    apart = adapted(params)
    assert isinstance(apart["pooler"]["kernel"], Adapted)

    def logits(params):
        return apply_encoder(ENCODER, params, tokens, mask, segments, None)

    found, expected = logits(apart), logits(merged(params))
    assert jnp.any(jnp.abs(found - logits(encoder)) > 1e-2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_merging_keeps_the_dtype_of_the_model(encoder, tuning):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder)
    params = {"model": narrow, "adapters": tuning["adapters"]}
    dtypes = {x.dtype.name for x in jax.tree.leaves(merged(params))}
    assert dtypes == {"bfloat16"}


def test_an_encoders_pooler_is_replaced_by_its_nearest_product(encoder):
    params = with_adapters(encoder, "low_rank", 16, jax.random.key(1))
    # Full rank is exact, up to float32.
    assert_same(merged(params)["pooler"], encoder["pooler"], rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_above_a_side_is_refused(encoder, rank):
    with pytest.raises(UserError, match=rf"rank {rank} does not fit .* from 1 to 16"):
        with_adapters(encoder, "lora", rank, jax.random.key(1))


def test_matrices_beside_adapters_say_which_ranks_fit(tuning):
    check_adapter_rank(tuning, 16)
    with pytest.raises(UserError, match="rank 17 does not fit"):
        check_adapter_rank(tuning, 17)
