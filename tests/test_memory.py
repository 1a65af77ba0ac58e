"""``memory_plan``: equal to the byte to real states, and to XLA's own count."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from experiments.model.llama import init_params
from experiments.model.shape import preset
from experiments.optim.build import build_optimizer
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.options import OptimizerOptions, with_defaults
from lowrank_optax import memory_plan
from lowrank_optax.codes import bytes_of
from tests.suite import ROWS, averaging

pytestmark = pytest.mark.usefixtures("fast_compilation")

SCANNED = {"blocks": (3, 64, 48), "embedding": (50, 64), "norm": (64,), "scale": ()}
UNSCANNED = {"0": {"w": (64, 48)}, "1": {"w": (64, 48)}, "norm": (64,)}
TREES = {"scanned": SCANNED, "unscanned": UNSCANNED}


def arrays(shapes, dtype):
    return jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


MORE = {
    "adamw": optax.adamw(0.1),
    "adafactor": optax.adafactor(0.1),
    "optax galore": optax.contrib.galore(0.1, rank=8),
    "8 bits": lowrank_optax.low_bit(
        lowrank_optax.adarankgrad(0.1, 8), 8, 4, min_size=1
    ),
    "accumulate": lowrank_optax.accumulate(lowrank_optax.projfactor(0.1, 4, 4), 2),
    "MultiSteps": optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
    "budget": lowrank_optax.galore(0.1, lowrank_optax.budget("30kB")),
    "partition": optax.partition(
        {"a": lowrank_optax.galore(0.1, 8), "b": optax.sgd(0.1, 0.9)},
        lambda params: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", params),
    ),
}
METHODS = {**{row.name: row.build(0.1) for row in ROWS}, **MORE}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_the_state_to_the_byte(name, tree, dtype):
    params = arrays(TREES[tree], dtype)
    plan = memory_plan(METHODS[name], params)
    assert plan.optimizer_bytes == bytes_of(METHODS[name].init(params))
    assert plan.parameter_bytes == plan.gradient_bytes == bytes_of(params)
    assert sum(plan.state_bytes.values()) == plan.optimizer_bytes
    shapes = jax.eval_shape(lambda: params)
    assert memory_plan(METHODS[name], shapes) == plan


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [
        *((name, "adamw") for name in OPTIMIZERS),
        *(("galore", policy) for policy in ("low_bit", "projected", "factored")),
    ],
)
def test_the_plan_is_the_state_of_the_experiments(name, vocabulary):
    model = preset("tiny", 257)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    options = OptimizerOptions(optimizer=name, vocabulary_optimizer=vocabulary)
    options = OptimizerOptions(
        **{
            **vars(options),
            **with_defaults(options, steps=10, hidden_size=model.hidden_size),
        }
    )
    tx = build_optimizer(options, optax.constant_schedule(1e-3))
    state = jax.eval_shape(tx.init, params)
    assert memory_plan(tx, params).optimizer_bytes == bytes_of(state)


def test_each_leaf_says_what_it_takes_and_why():
    params = arrays({**SCANNED, "small": (6, 6)}, jnp.float32)
    plan = memory_plan(lowrank_optax.galore(0.1, 8), params)
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    blocks = leaves["['blocks']"]
    assert blocks.is_projected
    assert dict(blocks.bytes.state) == {
        "basis": 4 * 3 * 48 * 8,
        "mu": 4 * 3 * 64 * 8,
        "nu": 4 * 3 * 64 * 8,
        "scalars": 4 * 3 * 5,
    }
    assert blocks.full_rank_bytes == 2 * 4 * 3 * 64 * 48
    small = leaves["['small']"]
    assert not small.is_projected
    assert "not above rank 8" in small.projection
    assert dict(small.bytes.state) == {"mu": 144, "nu": 144}
    # ScaleByLowRankState's and Adam's.
    assert plan.other_bytes == 8
    whole = memory_plan(optax.adam(0.1), params)
    assert plan.full_rank_bytes == whole.optimizer_bytes + 4


def test_the_accumulator_is_listed():
    params = arrays(SCANNED, jnp.float32)
    tx = lowrank_optax.accumulate(lowrank_optax.galore(0.1, 8), 2)
    assert memory_plan(tx, params).state_bytes["sums"] == bytes_of(tx.init(params).sums)


def test_low_bits_are_counted_in_their_moment():
    params = {"w": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    plan = memory_plan(
        lowrank_optax.low_bit(lowrank_optax.galore(0.1, 64), 8, 4), params
    )
    # Codes, scales, and a seed.
    assert plan.state_bytes["mu"] == 1024 * 64 + 4 * 4 * 64 + 4
    assert plan.state_bytes["basis"] == 512 * 64 // 2 + 4 * 2 * 64
    assert plan.full_rank_bytes - plan.other_bytes == 2 * 4 * 1024 * 512


def test_a_moment_that_is_named_is_counted_at_full_rank_as_a_known_one():
    params = arrays(SCANNED, jnp.float32)
    named, known = (
        memory_plan(lowrank_optax.scale_by_low_rank(inner, 8, moments=kinds), params)
        for inner, kinds in ((averaging(), {"avg": "first"}), (optax.trace(0.9), {}))
    )
    assert named.optimizer_bytes == known.optimizer_bytes
    assert named.full_rank_bytes == known.full_rank_bytes
    # The state of a momentum at full size, and the counter.
    assert known.full_rank_bytes == bytes_of(params) + 4


def test_a_key_in_the_state_is_counted():
    params = arrays(UNSCANNED, jnp.float32)
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    galore = lowrank_optax.galore(0.1, 8)
    plans = [memory_plan(tx, params) for tx in (optax.chain(noise, galore), galore)]
    added = plans[0].other_bytes - plans[1].other_bytes
    # Its counter and two words of a key.
    assert added == 4 + 8


def _squares(params):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_inside_subspaces_are_counted_as_they_are(name, dtype):
    tx, params = METHODS[name], arrays(SCANNED, dtype)
    plan, state = memory_plan(tx, params), jax.eval_shape(tx.init, params)
    gradient = lowrank_optax.subspace_value_and_grad(_squares, tx)
    try:
        found, why = bytes_of(jax.eval_shape(gradient, params, state)[1]), ""
    except ValueError as error:
        found, why = plan.gradient_bytes, str(error)
    assert plan.subspace_gradient_bytes == found
    is_full = re.search("full gradient|no leaf of these", why) is not None
    assert is_full == (found == plan.gradient_bytes)


def test_a_device_has_its_part_of_the_gradients_inside_subspaces(cut_rows):
    tx, (w,) = lowrank_optax.galore(0.1, 8), cut_rows.values()
    across = jax.ShapeDtypeStruct(
        w.shape, w.dtype, sharding=NamedSharding(w.sharding.mesh, P(None, None, "x"))
    )
    for params, rows in (({"w": w}, 64 // 4), ({"w": across}, 64)):
        plan = memory_plan(tx, params)
        assert plan.per_device is not None
        assert plan.per_device.gradients == 3 * 64 * 48 * 4 // 4
        # Coordinates (3, 64, 8): sums over a side that is cut are whole everywhere.
        assert plan.per_device.subspace_gradients == 3 * rows * 8 * 4


def test_it_prints_a_table_and_converts_to_json():
    params = arrays(SCANNED, jnp.float32)
    plan = memory_plan(lowrank_optax.galore(0.1, 8), params)
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(plan.leaves)
    assert "rows projected" in lines[2]
    assert lines[-1].startswith("in all")
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["optimizer_bytes"] == plan.optimizer_bytes
    assert found["leaves"][0]["bytes"]["state"]["basis"] > 0


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["adarankgrad", "projfactor", "8 bits", "adamw"])
def test_a_device_holds_what_the_plan_says(name, mode):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(mode, mode))
    specs = {
        "blocks": P(None, "x", "y"),
        "embedding": P(None, "x"),
        "norm": P("x"),
        "scale": P(),
    }
    params = arrays(SCANNED, jnp.float32)
    with jax.set_mesh(mesh):
        sharded = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name]))
            for name, x in params.items()
        }
        plan = memory_plan(METHODS[name], sharded)
        state = METHODS[name].init(sharded)
    assert plan.optimizer_bytes == bytes_of(state)

    def on_first_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert plan.per_device is not None
    assert plan.per_device.optimizer == on_first_device(state)
    assert plan.per_device.parameters == on_first_device(sharded)
    assert "on each device" in str(plan)


@pytest.fixture
def cut_rows():
    """Parameters whose rows are cut, by which the bases of their columns are whole."""
    mesh = AbstractMesh((4,), ("x",))
    rows = NamedSharding(mesh, P(None, "x"))
    return {"w": jax.ShapeDtypeStruct((3, 64, 48), jnp.float32, sharding=rows)}


def _with_basis(shardings, basis):
    subspace = shardings.subspaces["w"]._replace(basis=basis)
    return shardings._replace(subspaces={"w": subspace})


def test_a_device_has_what_the_given_shardings_leave_it(cut_rows):
    tx = lowrank_optax.galore(0.1, 8)
    shardings = lowrank_optax.state_shardings(tx, cut_rows)
    plan = memory_plan(tx, cut_rows)
    assert memory_plan(tx, cut_rows, state_shardings=shardings) == plan
    first = _with_basis(shardings[0], cut_rows["w"].sharding)
    found = memory_plan(tx, cut_rows, state_shardings=(first, *shardings[1:]))
    basis = 4 * 3 * 48 * 8
    assert plan.per_device.state["basis"] == basis
    assert found.per_device.state == {**plan.per_device.state, "basis": basis // 4}
    assert found.optimizer_bytes == plan.optimizer_bytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[0], ValueError, "not a tree like the state; start from"),
        (
            lambda x: jax.tree.map(lambda s: s.update(spec=P("x")), x),
            ValueError,
            r"^state_shardings\[0\].count is NamedSharding.* not fit \(\)\.$",
        ),
        (
            lambda x: (_with_basis(x[0], x[0].count.update(spec=P("x"))), *x[1:]),
            ValueError,
            r"basis is NamedSharding.* not fit \(3, 48, 8\)\.$",
        ),
        (
            lambda x: jax.tree.map(lambda s: s.spec, x),
            TypeError,
            r"^state_shardings\[0\].count is P.*, and no NamedSharding\.$",
        ),
    ],
)
def test_shardings_that_do_not_fit_the_state_are_refused(
    cut_rows, change, error, message
):
    tx = lowrank_optax.galore(0.1, 8)
    given = change(lowrank_optax.state_shardings(tx, cut_rows))
    with pytest.raises(error, match=message):
        memory_plan(tx, cut_rows, state_shardings=given)


def test_shardings_of_a_state_need_those_of_its_parameters(cut_rows):
    tx = lowrank_optax.galore(0.1, 8)
    given = lowrank_optax.state_shardings(tx, cut_rows)
    params = {"w": jnp.zeros((3, 64, 48))}
    with pytest.raises(ValueError, match="need parameters with a NamedSharding"):
        memory_plan(tx, params, state_shardings=given)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adamw", "float32"),
        ("galore", "bfloat16"),
        ("8 bits", "float32"),
        ("projfactor", "bfloat16"),
    ],
)
def test_xla_counts_the_same_arguments(name, dtype):
    params = jax.eval_shape(lambda: arrays(SCANNED, dtype))
    tx, tokens = METHODS[name], jax.ShapeDtypeStruct((16, 8), jnp.int32)

    def step(params, state, tokens):
        def loss(params):
            hidden = params["embedding"][tokens] * params["norm"] * params["scale"]
            return jnp.mean(jnp.tanh(hidden @ params["blocks"][0]))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    plan = memory_plan(tx, params, compiled.compile())
    assert plan.compiled is not None
    expected = plan.parameter_bytes + plan.optimizer_bytes + bytes_of(tokens)
    assert plan.compiled["arguments"] == pytest.approx(expected, rel=0.02)
    # Donated: outputs take the place of arguments.
    assert plan.compiled["aliased"] == pytest.approx(expected, rel=0.02)
    assert plan.compiled["peak"] >= expected + plan.compiled["temporaries"]
    assert "compiled step: arguments" in str(plan)


def test_seven_billion_parameters_are_planned_from_shapes():
    model = preset("7b", 32_000, param_dtype="bfloat16")
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    plan = memory_plan(lowrank_optax.galore(1e-2, rank=1024), params)
    assert plan.parameter_bytes == 2 * sum(
        np.prod(x.shape) for x in jax.tree.leaves(params)
    )
    assert 13.4e9 < plan.parameter_bytes < 13.5e9


def test_moments_of_half_precision_are_counted_in_float32_at_full_rank():
    params = {"w": jnp.zeros((64, 40), jnp.bfloat16)}
    plan = memory_plan(lowrank_optax.galore(0.1, 8), params)
    assert plan.leaves[0].full_rank_bytes == 2 * 4 * 64 * 40


def test_donated_arguments_count_once_in_the_peak():
    params = {"w": jnp.zeros((64, 40))}
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    compiled = step.lower(params).compile()
    found = memory_plan(lowrank_optax.galore(0.1, 8), params, compiled).compiled
    size = 4 * 64 * 40
    assert (found["arguments"], found["aliased"]) == (size, size)
    assert found["peak"] == size + found["temporaries"]
