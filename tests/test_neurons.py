"""The scale by neuron: its oracle, its shapes, and what stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers, scale_by_neuron
from tests.suite import random_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

SHAPES = {"w": (12, 8), "stack": (3, 8, 12), "heads": (12, 2, 4)}
SHAPES |= {"out": (2, 6, 8), "b": (8,)}
NUMBERS = {
    "w": LowRankDimensionNumbers(),
    "stack": LowRankDimensionNumbers(1, 2),
    "heads": LowRankDimensionNumbers(0, (1, 2)),
    "out": LowRankDimensionNumbers((0, 1), 2),
    "b": None,
}


def updates(count=4):
    """Updates whose neurons differ in size by three orders."""
    for seed in range(count):
        found = random_like(SHAPES, seed)
        yield {
            name: x * 10.0 ** jnp.linspace(-3, 0, x.shape[-1])
            for name, x in found.items()
        }


def reference(matrices, decay):
    """U' of a run of matrices (inputs, outputs), in float64."""
    average = np.zeros(matrices[0].shape[1])
    for u in np.asarray(matrices, np.float64):
        average = decay * average + (1 - decay) * np.mean(u**2, 0)
        w = u / (np.sqrt(average) + 1e-8)
        yield w * np.linalg.norm(u) / np.linalg.norm(w)


def run(tx, trees, params=None):
    state = tx.init(random_like(SHAPES) if params is None else params)
    update = jax.jit(tx.update)
    for tree in trees:
        found, state = update(tree, state)
        yield found, state


def test_updates_are_those_of_the_reference():
    given = list(updates())
    tx = scale_by_neuron(0.9, dimension_numbers=NUMBERS)
    found = [x for x, _ in run(tx, given)]
    matrices = {
        "w": lambda x: x["w"],
        "second of the stack": lambda x: x["stack"][1],
        "heads": lambda x: x["heads"].reshape(12, 8),
        "out": lambda x: x["out"].reshape(12, 8),
    }
    for name, matrix in matrices.items():
        expected = reference([matrix(x) for x in given], 0.9)
        for actual, wanted in zip(found, expected, strict=True):
            # Sums of a dozen numbers in float32.
            np.testing.assert_allclose(
                matrix(actual), wanted, rtol=2e-6, atol=1e-9, err_msg=name
            )
    for before, after in zip(given, found, strict=True):
        np.testing.assert_array_equal(before["b"], after["b"])


def test_without_decay_all_neurons_are_of_one_size_and_the_norm_stays():
    (given,) = updates(1)
    ((found, _),) = run(scale_by_neuron(0.0, dimension_numbers=NUMBERS), [given])
    sizes = jnp.linalg.norm(found["stack"], axis=1)
    # At a size of 1e-3 epsilon is 1e-5 of it.
    np.testing.assert_allclose(sizes / sizes[:, :1], 1, rtol=1e-4)
    norms = (jnp.linalg.norm(x["stack"], axis=(1, 2)) for x in (given, found))
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_without_decay_there_is_no_state_unless_the_decay_is_traced():
    (given,) = updates(1)
    ((found, state),) = run(scale_by_neuron(0.0, dimension_numbers=NUMBERS), [given])
    assert jax.tree.leaves(state) == []
    traced = scale_by_neuron(jnp.zeros([]), dimension_numbers=NUMBERS)
    ((expected, kept),) = run(traced, [given])
    assert kept.squares["w"].shape == (1, 8)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_root_mean_square_is_that_of_each_matrix(decay):
    tx = scale_by_neuron(decay, rms=0.2, dimension_numbers=NUMBERS)
    plain = scale_by_neuron(decay, dimension_numbers=NUMBERS)
    given = list(updates())
    for (found, _), (before, _) in zip(run(tx, given), run(plain, given), strict=True):
        sizes = np.sqrt(np.mean(np.square(found["stack"]), (1, 2)))
        np.testing.assert_allclose(sizes, 0.2, rtol=1e-6)
        ratios = found["stack"] / before["stack"]
        expected = np.broadcast_to(ratios[:, :1, :1], ratios.shape)
        np.testing.assert_allclose(ratios, expected, rtol=1e-5)
        np.testing.assert_array_equal(found["b"], before["b"])


def test_a_root_mean_square_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"rms must be above 0, got 0\.0"):
        scale_by_neuron(rms=0.0)


def test_neurons_of_a_weight_are_along_its_first_axis():
    """Equinox and PyTorch store (output, input): the update of the other is turned."""
    given = {"up": {"weight": random_like({"w": (12, 8)})["w"]}}
    turned = {"up": {"kernel": given["up"]["weight"].T}}
    tx = scale_by_neuron()
    ((found, state),) = run(tx, [given], given)
    ((expected, _),) = run(tx, [turned], turned)
    assert state.squares["up"]["weight"].shape == (12, 1)
    np.testing.assert_allclose(
        found["up"]["weight"], expected["up"]["kernel"].T, rtol=1e-5
    )


def test_the_state_is_a_vector_of_each_matrix():
    state = scale_by_neuron(dimension_numbers=NUMBERS).init(random_like(SHAPES))
    shapes = {name: x.shape for name, x in state.squares.items() if name != "b"}
    assert shapes == {
        "w": (1, 8),
        "stack": (3, 1, 12),
        "heads": (1, 2, 4),
        "out": (1, 1, 8),
    }
    assert jax.tree.leaves(state.squares["b"]) == []


def test_what_has_no_update_gets_none():
    zeros = {"w": jnp.zeros((12, 8)).at[:, 0].set(1)}
    for found, _ in run(scale_by_neuron(), [zeros, {"w": jnp.zeros((12, 8))}], zeros):
        assert jnp.all(jnp.isfinite(found["w"]))
        np.testing.assert_array_equal(found["w"][:, 1:], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_updates_stay_narrow_and_are_averaged_in_float32(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_like({"w": (12, 8)}))
    ((found, state),) = run(scale_by_neuron(), [params], params)
    assert (found["w"].dtype, state.squares["w"].dtype) == (dtype, jnp.float32)
    ((expected, _),) = run(
        scale_by_neuron(), [jax.tree.map(jnp.float32, params)], params
    )
    np.testing.assert_array_equal(found["w"], expected["w"].astype(dtype))


def test_boxes_stay_and_the_state_has_the_names_of_its_axes():
    box = nn.Partitioned(random_like({"w": (12, 8)})["w"], ("inputs", "outputs"))
    tx = scale_by_neuron()
    state = tx.init({"w": box})
    assert state.squares["w"].names == (None, "outputs")
    found, after = jax.jit(tx.update)({"w": box}, state)
    assert isinstance(found["w"], nn.Partitioned)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    bare = {"w": box.value}
    expected, _ = jax.jit(tx.update)(bare, tx.init(bare))
    np.testing.assert_array_equal(found["w"].value, expected["w"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_matrix_is_scaled_as_on_one_device(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    whole = random_like({"w": (12, 8)})
    sharding = NamedSharding(mesh, P("x", "y"))
    params = jax.tree.map(lambda x: jax.device_put(x, sharding), whole)
    tx = scale_by_neuron()
    with jax.set_mesh(mesh):
        ((found, state),) = run(tx, [params], params)
    assert found["w"].sharding.is_equivalent_to(sharding, 2)
    assert state.squares["w"].sharding.spec[1] == "y"
    ((expected, _),) = run(tx, [whole], whole)
    # Sums in another order.
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


def test_low_rank_muon_scales_neurons_if_asked():
    params, grads = random_like({"w": (24, 16)}), random_like({"w": (24, 16)}, 1)
    options = {"rank": 4, "beta": 0.9}
    asked = lowrank_optax.low_rank_muon(0.1, **options, neuron_decay=0.8)
    chained = optax.chain(
        lowrank_optax.scale_by_low_rank_muon(**options),
        scale_by_neuron(0.8),
        optax.scale_by_learning_rate(0.1),
    )
    found, expected = (
        jax.jit(tx.update)(grads, tx.init(params), params)[0]["w"]
        for tx in (asked, chained)
    )
    np.testing.assert_array_equal(found, expected)
    # In eight bits the vector stays as it is.
    coded = lowrank_optax.low_bit(asked, 8, 8, min_size=1)
    vectors = [x for x in jax.tree.leaves(coded.init(params)) if x.shape == (1, 16)]
    assert [x.dtype for x in vectors] == [jnp.float32]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(
        ValueError, match=rf"decay must be inside \[0, 1\), got {decay}"
    ):
        scale_by_neuron(decay)


def test_a_state_of_other_parameters_is_refused():
    tx = scale_by_neuron()
    state = tx.init({"w": jnp.ones((12, 6))})
    with pytest.raises(ValueError, match=r"\['w'\].*shape \(1, 6\).*wants \(1, 8\)"):
        tx.update({"w": jnp.ones((12, 8))}, state)
