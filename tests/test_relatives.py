"""SUMO, Muon in a subspace, LDAdam, Fira, APOLLO: what is particular to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from tests import references
from tests.suite import gradients, random_like, run, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 3
SHAPES = {"w": (2, 12, 8), "wide": (8, 16), "small": (5, 3), "bias": (8,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
METHODS = {
    "sumo": lambda **o: lowrank_optax.sumo(
        0.1, RANK, refresh=lowrank_optax.every(3), **o
    ),
    "low_rank_muon": lambda **o: lowrank_optax.low_rank_muon(
        0.1, RANK, refresh=lowrank_optax.every(3), **o
    ),
    "ldadam": lambda **o: lowrank_optax.ldadam(0.1, RANK, **o),
    "fira": lambda **o: lowrank_optax.fira(0.1, RANK, 3, **o),
    "apollo": lambda **o: lowrank_optax.apollo(0.1, RANK, 3, **o),
}
every_method = pytest.mark.parametrize("name", METHODS)
needs_full = pytest.mark.parametrize("name", ["fira", "apollo", "low_rank_muon"])


def states(optimizer, steps, params=PARAMS):
    return run(jax.jit(optimizer.update), optimizer.init(params), params, range(steps))


@every_method
def test_the_state_keeps_its_type_and_updates_their_dtype(name):
    params = {name: jnp.zeros(x.shape, jnp.bfloat16) for name, x in PARAMS.items()}
    optimizer = METHODS[name]()
    before = optimizer.init(params)
    history, after = states(optimizer, 4, params)
    assert types(after) == types(before)
    for update in jax.tree.leaves(history):
        assert update.dtype == jnp.bfloat16
        assert jnp.all(jnp.isfinite(update))


@every_method
def test_bytes_of_the_state_are_those_of_the_docstring(name):
    params = {"w": jnp.zeros((64, 32))}
    arrays = [
        x.shape
        for x in jax.tree.leaves(jax.eval_shape(METHODS[name]().init, params))
        if x.ndim == 2
    ]
    basis, moment = (32, RANK), (64, RANK)
    expected = {
        "sumo": [basis, moment],
        "low_rank_muon": [basis, moment],
        "ldadam": [basis, moment, moment],
        "fira": [basis, moment, moment],
        "apollo": [moment, moment],
    }
    assert sorted(arrays) == sorted(expected[name])


def test_sumo_has_muon_at_full_size_and_adam_for_vectors():
    optimizer = METHODS["sumo"]()
    history, _ = states(optimizer, 5)
    small = {"small": PARAMS["small"]}
    muon = optax.contrib.muon(
        0.1, consistent_rms=0.2, weight_decay=0.0, adam_weight_decay=0.0
    )
    state = muon.init(small)
    adam = optax.adam(0.1)
    vector, adam_state = {"bias": PARAMS["bias"]}, adam.init({"bias": PARAMS["bias"]})
    for step, updates in enumerate(history):
        grads = gradients(PARAMS, step)
        expected, state = muon.update({"small": grads["small"]}, state, small)
        # Newton-Schulz enlarges rounding of the smallest singular value by 485.
        np.testing.assert_allclose(
            updates["small"], expected["small"], rtol=1e-3, atol=1e-5
        )
        expected, adam_state = adam.update({"bias": grads["bias"]}, adam_state, vector)
        np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-5)


def test_sumo_updates_have_the_root_mean_square_of_their_rank():
    history, _ = states(METHODS["sumo"](), 4)
    for name, side in (("w", 8), ("wide", 8)):
        # Of full rank it would be 0.2; singular values are 0.7 to 1.2 and not 1.
        expected = 0.1 * 0.2 * (RANK / side) ** 0.5
        for updates in history:
            for matrix in updates[name].reshape(-1, *updates[name].shape[-2:]):
                rms = float(jnp.sqrt(jnp.mean(matrix**2)))
                assert 0.6 * expected < rms < 1.25 * expected
                assert jnp.linalg.matrix_rank(matrix, rtol=1e-4) == RANK


def test_low_rank_muon_has_muon_at_full_size_and_adam_for_vectors():
    # As published: optax's corrects a bias of the first steps that is no matter here.
    history, _ = states(METHODS["low_rank_muon"](), 5)
    momentum, moment = references.nesterov(), np.zeros(SHAPES["small"])
    adam = optax.adam(0.1)
    vector = {"bias": PARAMS["bias"]}
    adam_state = adam.init(vector)
    for step, updates in enumerate(history):
        grads = gradients(PARAMS, step)
        small = np.asarray(grads["small"], np.float64)
        update, moment, _ = momentum(small, moment, None, step + 1)
        expected = -0.1 * references.orthogonalized(update, 0.2)
        np.testing.assert_allclose(updates["small"], expected, rtol=1e-3, atol=1e-5)
        expected, adam_state = adam.update({"bias": grads["bias"]}, adam_state, vector)
        np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-5)


def test_the_residual_takes_steps_outside_the_subspace():
    inside, _ = states(METHODS["low_rank_muon"](residual=0.0), 3)
    beside, _ = states(METHODS["low_rank_muon"](), 3)
    for name in ("w", "wide"):
        assert np.all(jnp.linalg.matrix_rank(inside[-1][name], rtol=1e-4) == RANK)
        singular = jnp.linalg.svd(beside[-1][name], compute_uv=False)
        # All directions get steps of a size, 0.7 to 1.2 once they have converged.
        assert float(jnp.min(singular / singular[..., :1])) > 0.4


def test_where_nothing_is_kept_back_it_is_muon_without_memory():
    optimizer = METHODS["low_rank_muon"](beta=0.0, residual=1.0, nesterov=False)
    muon = optax.contrib.muon(
        0.1, beta=0.0, nesterov=False, consistent_rms=0.2, weight_decay=0.0
    )
    params = {"wide": PARAMS["wide"]}
    ours, _ = states(optimizer, 4, params)
    expected, _ = run(muon.update, muon.init(params), params, range(4))
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x["wide"], y["wide"], rtol=1e-3, atol=1e-5)


def test_kernels_of_more_axes_are_orthogonalized_as_their_matrix():
    params = {"w": jnp.zeros((8, 4, 4)), "flat": jnp.zeros((8, 16))}
    numbers = {
        "w": lowrank_optax.LowRankDimensionNumbers(0, (1, 2)),
        "flat": lowrank_optax.LowRankDimensionNumbers(),
    }
    optimizer = METHODS["low_rank_muon"](
        dimension_numbers=numbers, basis=lowrank_optax.exact_svd()
    )
    state = optimizer.init(params)
    gradient = gradients(params, 0)["flat"]
    grads = {"w": gradient.reshape(8, 4, 4), "flat": gradient}
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    np.testing.assert_allclose(
        updates["w"].reshape(8, 16), updates["flat"], rtol=1e-4, atol=1e-6
    )


def test_the_rank_of_sumo_may_follow_the_energy():
    rank = lowrank_optax.energy_rank(6, threshold=0.5, min_rank=1)
    optimizer = lowrank_optax.sumo(0.1, rank, refresh=lowrank_optax.every(2))
    _, state = states(optimizer, 9)
    found = lowrank_optax.ranks(state)
    assert all(np.all(found[name] < 6) for name in ("['w']", "['wide']"))


def test_fira_adds_what_the_subspace_does_not_hold():
    fira, _ = states(METHODS["fira"](scale=1.0), 1)
    matrix, gradient = fira[0]["wide"], gradients(PARAMS, 0)["wide"]
    assert jnp.linalg.matrix_rank(matrix) == 8 > RANK
    # Adam's first step has entries of 1, so that phi_i = sqrt(r) / ||R_i||: inside the
    # subspace and outside the update goes against the gradient.
    assert jnp.sum(matrix * gradient) < 0


def test_the_norm_of_what_is_added_grows_slowly():
    optimizer = lowrank_optax.apollo(1.0, RANK, 100, growth=1.5, corrected=True)
    update = jax.jit(optimizer.update)
    state, norms = optimizer.init(PARAMS), []
    for factor in (1, -1, -1, -1):
        grads = jax.tree.map(lambda x, f=factor: f * x, gradients(PARAMS, 0))
        updates, state = update(grads, state, PARAMS)
        norms.append(float(jnp.linalg.norm(updates["wide"])))
    # The momentum nearly cancels at first, and then turns around.
    growth = np.divide(norms[1:], norms[:-1])
    assert growth[0] < 0.2
    assert growth[1] == pytest.approx(1.5, rel=1e-5)
    assert np.all(growth <= 1.5 * (1 + 1e-5))


def test_zero_rows_and_gradients_give_finite_updates():
    for name in METHODS:
        optimizer = METHODS[name]()
        grads = gradients(PARAMS, 0)
        grads["wide"] = grads["wide"].at[:, 3].set(0)
        state = optimizer.init(PARAMS)
        for g in (jax.tree.map(jnp.zeros_like, grads), grads):
            updates, state = jax.jit(optimizer.update)(g, state, PARAMS)
            for update in jax.tree.leaves(updates):
                assert jnp.all(jnp.isfinite(update)), name


@needs_full
def test_gradients_in_the_subspace_are_refused_by_name(name):
    optimizer = METHODS[name]()

    def loss(params, x):
        return jnp.sum((x @ params["wide"]) ** 2)

    gradient = lowrank_optax.subspace_value_and_grad(loss, optimizer)
    state = optimizer.init(PARAMS)
    # The first of the projected leaves, of which no gradient can be taken inside.
    with pytest.raises(ValueError, match=r"\['w'\].*needs the full gradient"):
        gradient(PARAMS, state, jnp.ones((4, 8)))
    inside = lowrank_optax.Projected(jnp.zeros((16, RANK)))
    narrow = {**gradients(PARAMS, 0), "wide": inside}
    with pytest.raises(ValueError, match=r"\['wide'\].*needs the full gradient"):
        optimizer.update(narrow, state, PARAMS)


@needs_full
def test_full_gradients_are_accumulated(name):
    optimizer = METHODS[name]()
    window = lowrank_optax.accumulate(optimizer, 2)
    state = window.init(PARAMS)
    assert state.sums["wide"].shape == PARAMS["wide"].shape
    update = jax.jit(window.update)
    for step in range(4):
        updates, state = update(gradients(PARAMS, step), state, PARAMS)
    expected_state = optimizer.init(PARAMS)
    for step in (0, 2):
        pair = gradients(PARAMS, step), gradients(PARAMS, step + 1)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, *pair)
        expected, expected_state = jax.jit(optimizer.update)(
            mean, expected_state, PARAMS
        )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5),
        updates,
        expected,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: lowrank_optax.sumo(0.1, 4, beta=1.0),
        lambda: lowrank_optax.sumo(0.1, 4, ns_steps=0),
        lambda: lowrank_optax.sumo(0.1, 4, ns_steps=2.5),
        lambda: lowrank_optax.sumo(0.1, 4, rms=-0.1),
        lambda: lowrank_optax.low_rank_muon(0.1, 4, beta=1.0),
        lambda: lowrank_optax.low_rank_muon(0.1, 4, residual=-1.0),
        lambda: lowrank_optax.fira(0.1, 4, growth=0.9),
        lambda: lowrank_optax.apollo(0.1, 4, weight_decay=-1.0),
        lambda: lowrank_optax.apollo(0.1, lowrank_optax.energy_rank(4)),
        lambda: lowrank_optax.ldadam(0.1, 4, b1=1.0),
        lambda: lowrank_optax.ldadam(0.1, 4, rho=1.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|energy"):
        make()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("sumo", AxisType.Auto),
        ("sumo", AxisType.Explicit),
        ("low_rank_muon", AxisType.Auto),
        ("low_rank_muon", AxisType.Explicit),
        ("fira", AxisType.Auto),
        ("fira", AxisType.Explicit),
        ("ldadam", AxisType.Explicit),
        ("apollo", AxisType.Explicit),
    ],
)
def test_sharded_updates_are_those_of_one_device(name, mode):
    # Four matrices, so that Newton-Schulz is shared out, with padding.
    params = {"w": jnp.zeros((4, 16, 8)), "bias": jnp.zeros(8)}
    optimizer = METHODS[name]()
    expected, _ = states(optimizer, 4, params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    specs = {"w": P(None, "x", None), "bias": P()}

    def place(tree):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        return jax.device_put(tree, shardings)

    with jax.set_mesh(mesh):
        sharded = place(params)
        state = jax.jit(optimizer.init)(sharded)
        update = jax.jit(optimizer.update)
        for step in range(4):
            updates, state = update(place(gradients(params, step)), state, sharded)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=5e-4),
                updates,
                expected[step],
            )


def test_sumo_has_muon_for_a_wide_matrix_at_full_size():
    params = {"small": jnp.zeros((3, 12))}
    ours = lowrank_optax.sumo(0.1, 4, rms=0.2)
    muon = optax.contrib.muon(
        0.1, consistent_rms=0.2, weight_decay=0.0, adam_weight_decay=0.0
    )
    grads = random_like({"small": (3, 12)})
    updates, _ = ours.update(grads, ours.init(params), params)
    expected, _ = muon.update(grads, muon.init(params), params)
    np.testing.assert_allclose(
        updates["small"], expected["small"], rtol=1e-3, atol=1e-5
    )
