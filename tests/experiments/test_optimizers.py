"""The optimizers of the experiments: groups, learning rates, state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from experiments.model.groups import parameter_groups
from experiments.optim.build import build_optimizer
from experiments.optim.methods import OPTIMIZERS, gradients_of
from experiments.optim.options import OptimizerOptions, default_warmup, with_defaults
from experiments.optim.schedule import make_schedule
from experiments.optim.unstacked import unstacked
from experiments.run.memory import (
    adamw_memory_by_kind,
    adamw_state_bytes,
    block_leaves,
    block_state,
    memory_by_kind,
    optimizer_state_bytes,
)

pytestmark = pytest.mark.usefixtures("fast_compilation")

LAYERS, ROWS, COLUMNS, RANK = 3, 8, 12, 2


def random_tree(seed):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    return {
        "embedding": normal(20, ROWS),
        "blocks": {
            "attention": {"query": normal(LAYERS, ROWS, ROWS)},
            "mlp": {"up": normal(LAYERS, ROWS, COLUMNS)},
            "mlp_norm": normal(LAYERS, ROWS),
        },
        "norm": normal(ROWS),
    }


def make(optimizer, learning_rate=0.1, **changes):
    options = OptimizerOptions(optimizer=optimizer, **{"rank": RANK, **changes})
    filled = with_defaults(options, steps=10, hidden_size=ROWS)
    options = dataclasses.replace(options, **filled)
    return build_optimizer(options, lambda _: learning_rate)


@pytest.mark.parametrize("optimizer", ["muon", "low_rank_muon"])
def test_a_decay_of_neurons_brings_the_outputs_of_a_matrix_to_one_size(optimizer):
    params, grads = random_tree(0), random_tree(1)

    def update(neuron_decay):
        tx = make(optimizer, neuron_decay=neuron_decay, weight_decay=0.1)
        still = jax.tree.map(jnp.zeros_like, params)
        found, _ = jax.jit(tx.update)(grads, tx.init(still), still)
        return found["blocks"]["mlp"]["up"]

    kept, scaled = update(None), update(0.5)
    sizes = jnp.linalg.norm(scaled, axis=1)
    # After one update the average of squares is a multiple of these squares.
    np.testing.assert_allclose(sizes, jnp.broadcast_to(sizes[:, :1], sizes.shape), 1e-5)
    norms = (jnp.linalg.norm(x, axis=(1, 2)) for x in (kept, scaled))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    # Against the gradient, as without.
    assert jnp.all(jnp.sum(scaled * kept, (1, 2)) > 0)


def test_what_adarankgrad_leaves_outside_its_subspace_may_give_its_signs():
    params, grads = random_tree(0), random_tree(1)

    def update(residual):
        tx = make("adarankgrad", residual=residual, block_scale=1.0, clip_norm=None)
        found, state = jax.jit(tx.update)(grads, tx.init(params), params)
        (slot,) = (
            slot
            for path, slot in lowrank_optax.subspaces(state).items()
            if "query" in path
        )
        return found["blocks"]["attention"]["query"], slot.basis

    (inside, basis), (both, _) = update(None), update(0.5)
    g = grads["blocks"]["attention"]["query"]
    outside = g - jnp.einsum(
        "lar,lbr->lab", jnp.einsum("lab,lbr->lar", g, basis), basis
    )
    # The learning rate is 0.1. A float32 update of 0.4 has an error of 3e-8.
    np.testing.assert_allclose(both - inside, -0.05 * jnp.sign(outside), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": "adarankgrad"}, "subspace"),
        ({"optimizer": "adarankgrad", "gradients": "full"}, "full"),
        ({"optimizer": "adarankgrad", "residual": 1.0}, "full"),
        ({"optimizer": "adarankgrad", "residual": 0.0}, "subspace"),
        ({"optimizer": "low_rank_muon"}, "full"),
    ],
)
def test_a_residual_needs_full_gradients(changes, expected):
    assert gradients_of(OptimizerOptions(**changes)) == expected


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_the_least_rank_falls_in_a_line(steps):
    flags = {
        "min_rank": 4,
        "final_min_rank": 1,
        "threshold": 0.9,
        "rank_smoothing": 0.0,
    }
    flags |= {"min_refresh_interval": 1, "max_refresh_interval": 1, "min_rank_steps": 6}
    tx = make("adarankgrad", **{**flags, "rank": 4})
    params = random_tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        _, state = update(random_tree(i), state, params)
    # 4 - (steps - 1) / 2, at least 1. One column has a tenth of a random gradient.
    expected = {1: 4, 4: 2, 9: 1}[steps]
    for rank in jax.tree.leaves(lowrank_optax.ranks(state)):
        np.testing.assert_array_equal(rank, expected)


@pytest.mark.parametrize(
    "optimizer", [name for name, method in OPTIMIZERS.items() if "basis" in method.own]
)
def test_bases_of_cosines_are_numbers_in_the_state(optimizer):
    params = random_tree(0)
    for basis, shape in (("dct", (LAYERS, 1, RANK)), (None, (LAYERS, ROWS, RANK))):
        state = jax.eval_shape(make(optimizer, basis=basis).init, params)
        bases = [slot.basis.shape for slot in lowrank_optax.subspaces(state).values()]
        assert bases == [shape] * 2


@functools.cache
def first_updates(optimizer):
    """Returns the compiled (gradients, scale of blocks, weight decay) -> updates."""
    params = random_tree(0)

    def updates(grads, block_scale, weight_decay):
        tx = make(optimizer, block_scale=block_scale, weight_decay=weight_decay)
        return tx.update(grads, tx.init(params), params)[0]

    return jax.jit(updates)


def test_groups_are_block_matrices_norms_and_the_rest():
    assert parameter_groups(random_tree(0)) == {
        "embedding": "rest",
        "blocks": {
            "attention": {"query": "blocks"},
            "mlp": {"up": "blocks"},
            "mlp_norm": "norms",
        },
        "norm": "norms",
    }


def test_unstacked_galore_gives_each_layer_the_update_it_gets_alone():
    galore = optax.contrib.galore(0.1, rank=RANK, update_proj_gap=2, weight_decay=0.1)
    stacked, alone = unstacked(galore), galore
    params = random_tree(0)["blocks"]["mlp"]
    layers = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(LAYERS)]
    state, states = stacked.init(params), [alone.init(layer) for layer in layers]
    for seed in range(3):
        grads = random_tree(seed + 1)["blocks"]["mlp"]
        updates, state = stacked.update(grads, state, params)
        for i, layer in enumerate(layers):
            grad = jax.tree.map(lambda x, i=i: x[i], grads)
            expected, states[i] = alone.update(grad, states[i], layer)
            # An SVD of the same matrix may round in another order.
            np.testing.assert_allclose(updates["up"][i], expected["up"], atol=1e-6)


def test_optax_galore_projects_every_block_matrix_and_has_no_empty_array():
    state = make("optax_galore").init(random_tree(0))
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    projectors = jax.tree.leaves(optax.tree.get(block_state(state), "projector"))
    shapes = [leaf.shape for leaf in projectors]
    assert shapes == [(ROWS, RANK)] * LAYERS + [(COLUMNS, RANK)] * LAYERS


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_learning_rate_of_blocks_is_scaled_and_of_the_rest_is_not(optimizer):
    params, grads = random_tree(0), random_tree(1)
    one, double = (first_updates(optimizer)(grads, scale, 0.0) for scale in (1.0, 2.0))
    for group, before, after in zip(
        *map(jax.tree.leaves, (parameter_groups(params), one, double)), strict=True
    ):
        factor = 2 if group == "blocks" else 1
        np.testing.assert_allclose(after, factor * before, rtol=1e-6)
        assert np.abs(before).max() > 0


def test_blocks_scaled_by_one_under_adamw_are_plain_adamw():
    params, grads = random_tree(0), random_tree(1)
    ours = make("adamw", block_scale=1.0, clip_norm=None)
    plain = optax.adamw(0.1, weight_decay=0.0)
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, _ = ours.update(grads, ours.init(params), params)
    # One is compiled as a whole, the other operation by operation.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected
    )


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_norms_do_not_decay_and_all_else_does(optimizer):
    params, zeros = random_tree(0), jax.tree.map(jnp.zeros_like, random_tree(0))
    updates = first_updates(optimizer)(zeros, 1.0, 0.5)
    for group, update, param in zip(
        *map(jax.tree.leaves, (parameter_groups(params), updates, params)), strict=True
    ):
        decay = 0.0 if group == "norms" else 0.1 * 0.5
        np.testing.assert_allclose(update, -decay * param, rtol=1e-6)


def test_clipping_is_by_the_norm_of_the_whole_tree():
    params, grads = random_tree(0), random_tree(1)
    # Adam's first update is blind to scale but for eps: make that dominate.
    tx = make("adamw", eps=1e3, clip_norm=1.0, block_scale=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    scaled = jax.tree.map(lambda g: -0.1 * g / optax.tree.norm(grads) / 1e3, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), updates, scaled
    )


def test_the_schedule_warms_up_from_above_zero_and_ends_at_its_fraction():
    options = OptimizerOptions(
        learning_rate=0.4, warmup_steps=4, final_learning_rate_fraction=0.25
    )
    schedule = make_schedule(options, steps=20)
    rates = [float(schedule(count)) for count in range(20)]
    np.testing.assert_allclose(rates[:4], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


CURVES = {
    # 4 steps up, then down from 1 to 0.25 at the last of 20.
    "linear": lambda count: 1 - 0.75 * (count - 3) / 16,
    # The peak, but for the last 5.
    "wsd": lambda count: 1 - 0.75 * max(0, count - 14) / 5,
    "constant": lambda count: 1,
    "cosine": lambda count: 0.625 + 0.375 * np.cos(np.pi * (count - 3) / 16),
}


@pytest.mark.parametrize("name", list(CURVES))
def test_each_schedule_has_its_curve_behind_the_warm_up(name):
    options = OptimizerOptions(
        learning_rate=0.4,
        schedule=name,
        warmup_steps=4,
        decay_fraction=0.25,
        final_learning_rate_fraction=0.25,
    )
    schedule = make_schedule(options, steps=20)
    rates = [float(schedule(count)) / 0.4 for count in range(20)]
    expected = [0.25, 0.5, 0.75, *map(CURVES[name], range(3, 20))]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", list(CURVES))
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_rates_above_zero(name, steps):
    options = OptimizerOptions(
        schedule=name, warmup_steps=default_warmup(steps), decay_fraction=0.2
    )
    schedule = make_schedule(options, steps)
    for count in range(steps):
        assert 0 < schedule(count) <= 1.01 * options.learning_rate


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_memory_by_kind_adds_up_to_the_state(optimizer):
    params = random_tree(0)
    state = make(optimizer).init(params)
    kinds = memory_by_kind(params, state)
    assert optimizer_state_bytes(state) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )
    moments = kinds["basis"] + kinds["block moments"] + kinds["other moments"]
    assert moments == optimizer_state_bytes(state)
    with_basis = {"galore", "adarankgrad", "optax_galore", "sumo", "ldadam", "fira"}
    with_basis |= {"low_rank_muon", "frugal"}
    assert (kinds["basis"] > 0) == (optimizer in with_basis)
    # VLoRP's are as many here: what granularity 4 makes of matrices of 8 rows.
    # These parameters have no adapters: all of them are trained.
    as_many = {"adamw", "vlorp", "projfactor", "lora", "relora", "low_rank"}
    as_many |= {"stable_spam"}
    if optimizer not in as_many:
        assert kinds["block moments"] < adamw_memory_by_kind(params)["block moments"]


def test_adamw_keeps_two_numbers_per_parameter():
    params = random_tree(0)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert adamw_state_bytes(params) == 4 * (2 * count + 1)
    assert sum(leaf.size for leaf in block_leaves(params)) == LAYERS * ROWS * (
        ROWS + COLUMNS
    )


def _state_bytes(params, **flags):
    options = OptimizerOptions(**flags)
    filled = with_defaults(options, steps=10, hidden_size=512)
    tx = build_optimizer(dataclasses.replace(options, **filled), lambda _: 0.1)
    return optimizer_state_bytes(jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_table_says_what_bits_store(optimizer):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"blocks": {"up": leaf(16, 512, 1024)}, "norm": leaf(512)}
    plain = _state_bytes(params, optimizer=optimizer)
    for flag, what in (("moment_bits", "moments"), ("basis_bits", "bases")):
        stored = _state_bytes(params, optimizer=optimizer, **{flag: 8})
        assert (stored < plain) == (what in OPTIMIZERS[optimizer].codes), flag
