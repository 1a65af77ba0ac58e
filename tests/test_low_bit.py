"""``low_bit`` around every kind of optimizer: codes, bytes, formats, shardings."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import codes
from lowrank_optax.codes import Coded, is_coded
from tests.suite import gradients, nnx_trained_beside, random_like, run, types

pytestmark = pytest.mark.usefixtures("fast_compilation")

# One program each: eagerly, every operation on every shape is compiled for itself.
decoded_tree, encoded_tree = jax.jit(codes.decoded_tree), jax.jit(codes.encoded_tree)

RANK = 8
SHAPES = {"w": (48, 20), "layers": (2, 24, 40), "bias": (20,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.1),
    "lion": lambda: optax.lion(0.1),
    "galore": lambda: lowrank_optax.galore(0.1, RANK, update_proj_gap=3),
    "adarankgrad": lambda: lowrank_optax.adarankgrad(
        0.1, RANK, refresh=lowrank_optax.every(3)
    ),
    "vlorp": lambda: lowrank_optax.vlorp(0.1, 3, 2, refresh=lowrank_optax.every(3)),
    "projfactor": lambda: lowrank_optax.projfactor(
        0.1, 3, 2, refresh=lowrank_optax.every(3)
    ),
    "partition": lambda: optax.partition(
        {"a": lowrank_optax.galore(0.1, RANK), "b": optax.adam(0.1)},
        {"w": "a", "layers": "b", "bias": "b"},
    ),
    "accumulate": lambda: lowrank_optax.accumulate(lowrank_optax.galore(0.1, RANK), 2),
}
# bits, basis_bits
SETTINGS = {"moments": (8, None), "both": (8, 8), "packed": (8, 4), "basis": (None, 4)}
# Every optimizer, and every setting: not each with each, which is minutes to compile.
both = pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "both") for name in OPTIMIZERS),
        ("galore", "packed"),
        ("vlorp", "basis"),
    ],
)


def low_bit(name, setting="moments", **options):
    options = {"min_size": 1, "block": 16, **options}
    return lowrank_optax.low_bit(OPTIMIZERS[name](), *SETTINGS[setting], **options)


@functools.cache
def inner_update(name):
    return jax.jit(OPTIMIZERS[name]().update)


@functools.cache
def jitted(name, setting):
    optimizer = low_bit(name, setting)
    return optimizer, jax.jit(optimizer.update)


def coded_nodes(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_coded) if is_coded(x)]


def plain_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@both
def test_an_update_is_that_of_the_decoded_state_encoded(name, setting):
    optimizer, update = jitted(name, setting)
    _, state = run(update, jax.jit(optimizer.init)(PARAMS), PARAMS, range(4))
    grads = gradients(PARAMS, 4)
    # Step 4 refreshes nothing.
    expected, after = inner_update(name)(grads, decoded_tree(state), PARAMS)
    actual, new_state = update(grads, state, PARAMS)
    # Two programs: float32 rounding.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5),
        actual,
        expected,
    )
    assert types(new_state) == types(state)
    wanted = decoded_tree(encoded_tree(after, state))

    def assert_close(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # A value close to where codes change may fall to either side; few do.
        assert np.mean(np.abs(x - y) > 1e-3 * np.max(np.abs(y), initial=0)) < 0.01

    jax.tree.map(assert_close, decoded_tree(new_state), wanted)


@both
def test_state_and_updates_keep_their_types_over_refreshes(name, setting):
    optimizer, update = jitted(name, setting)
    state = jax.jit(optimizer.init)(PARAMS)
    history, after = run(update, state, PARAMS, range(8))
    assert types(after) == types(state)
    assert types(history[-1]) == types(PARAMS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(history))
    has_basis = name not in ("adamw", "lion", "vlorp", "projfactor")
    assert bool(coded_nodes(state)) == (SETTINGS[setting][0] == 8 or has_basis)


def test_moments_follow_the_basis_as_it_is_stored():
    """Momentum alone, with the packed basis: exact, but for the codes of 8 bits."""
    rank, params = 4, {"w": jnp.zeros((32, 12))}
    optimizer = lowrank_optax.low_bit(
        lowrank_optax.scale_by_low_rank(
            optax.trace(0.9), rank, refresh=lowrank_optax.every(2, stagger=False)
        ),
        basis_bits=4,
        min_size=1,
    )
    _, state = run(jax.jit(optimizer.update), optimizer.init(params), params, range(2))
    before = decoded_tree(state)
    grads = gradients(params, 2)
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    after = decoded_tree(state)
    old, new = (np.asarray(x.subspaces["w"].basis, np.float64) for x in (before, after))
    assert not np.allclose(old, new)
    followed = np.asarray(before.inner_state.trace["w"], np.float64) @ (old.T @ new)
    expected = 0.9 * followed + np.asarray(grads["w"], np.float64) @ new
    # The codes are of roots, whose scale is 1.25 of the largest at most.
    scale = 1.25 * np.sqrt(np.max(np.abs(expected), axis=0))
    step = (2 * np.sqrt(np.abs(expected)) + scale / 127) * scale / 127
    actual = after.inner_state.trace["w"]
    # Coded twice, a step each: after following, and after the update.
    assert np.all(np.abs(actual - expected) <= 2 * step)
    error = np.linalg.norm(updates["w"] - expected @ new.T)
    assert error <= 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["adamw", "galore", "adarankgrad", "vlorp"])
def test_moments_take_at_most_0_30_of_float32(name):
    params = {"w": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    optimizer = {
        "adamw": optax.adamw(0.1),
        "galore": lowrank_optax.galore(0.1, 64),
        "adarankgrad": lowrank_optax.adarankgrad(0.1, 64),
        "vlorp": lowrank_optax.vlorp(0.1, 8, 8),
    }[name]

    def moments(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(
            plain_bytes(value)
            for field in ("mu", "nu")
            for _, value in optax.tree.get_all_with_path(state, field)
        )

    ratio = moments(lowrank_optax.low_bit(optimizer)) / moments(optimizer)
    # One byte and 4 / 256 of one, of four; and a few for the seeds.
    assert ratio == pytest.approx(0.25 * (1 + 4 / 256), rel=3e-4)
    assert ratio <= 0.30


def test_small_arrays_and_float64_stay_as_they_are():
    params = {
        "w": jnp.zeros((64, 64)),
        "small": jnp.zeros((63, 65)),
        "b": jnp.zeros(64),
    }
    state = lowrank_optax.low_bit(optax.adam(0.1)).init(params)
    assert isinstance(state[0].mu["w"], Coded)
    assert isinstance(state[0].nu["w"], Coded)
    assert isinstance(state[0].mu["small"], jax.Array)  # 4,095 values
    assert isinstance(state[0].mu["b"], jax.Array)
    with jax.enable_x64(True):
        params = {"w": jnp.zeros((64, 64), jnp.float64)}
        state = lowrank_optax.low_bit(optax.adam(0.1)).init(params)
        assert not coded_nodes(state)


def test_half_precision_moments_are_coded():
    params = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    optimizer = lowrank_optax.low_bit(optax.adam(0.1))
    state = optimizer.init(params)
    assert len(coded_nodes(state)) == 2
    _, after = jax.jit(optimizer.update)(gradients(params, 0), state, params)
    assert types(after) == types(state)


def test_narrow_rows_share_a_block():
    params = {"w": jnp.zeros((3, 2))}
    optimizer = lowrank_optax.low_bit(optax.adam(0.1), min_size=1)
    state = optimizer.init(params)
    assert state[0].mu["w"].absmax.shape == (1, 1)
    _, state = optimizer.update(gradients(params, 0), state, params)
    expected = 0.1 * gradients(params, 0)["w"]
    scale = 1.05 * np.max(np.abs(expected)) ** 0.5
    # The width of a code of roots, at the top.
    step = 2 * scale**2 / 127
    error = np.abs(lowrank_optax.decode(state[0].mu["w"]) - expected)
    assert np.all(error <= step)


@pytest.mark.parametrize(
    "shape", [(8192, 8), (8192, 1), (3, 3, 512, 3), (65536, 1), (64, 128, 1), (8192,)]
)
def test_no_array_takes_more_than_0_30_of_float32(shape):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    sizes = [
        plain_bytes(jax.eval_shape(tx.init, params))
        for tx in (optax.adam(0.1), lowrank_optax.low_bit(optax.adam(0.1)))
    ]
    # One byte, 4 / 32 of one for the scale, and 4 for the seed of a matrix.
    assert sizes[1] / sizes[0] <= 0.30


def test_updates_follow_gradients_that_fall():
    """5,000 updates after those of half of each block fell to 1/30."""
    params, steps, drop = {"w": jnp.zeros((8, 256))}, 6000, 1000
    falls = jnp.arange(256) < 128

    def squares(optimizer):
        def body(state, t):
            noise = jax.random.normal(
                jax.random.fold_in(jax.random.key(0), t), (8, 256)
            )
            noise = jnp.where(falls & (t >= drop), noise / 30, noise)
            updates, state = optimizer.update({"w": noise}, state)
            v = lowrank_optax.decode(state.nu["w"])
            return state, [jnp.mean(x[:, :128]) for x in (v, updates["w"] ** 2)]

        scanned = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(steps))[1])
        found = np.asarray(scanned(optimizer.init(params)))
        # Means over 250 updates each.
        return found.reshape(2, -1, 250).mean(-1)

    plain = squares(optax.scale_by_adam())
    coded = squares(lowrank_optax.low_bit(optax.scale_by_adam(), min_size=1))
    second, updates = coded / plain
    # To nearest v stayed at 70 times of float32's, and updates at 0.12. Measured over
    # seeds: 0.02 and 0.02; half of that is what 1,024 values leave to chance.
    np.testing.assert_allclose(second, 1, atol=0.05)
    np.testing.assert_allclose(np.sqrt(updates), 1, atol=0.05)


def test_moments_of_gradients_that_stop_go_to_zero():
    """A first moment to nearest stayed at 4 codes of its block for ever."""
    params = {"w": jnp.zeros((4, 64))}
    optimizer = lowrank_optax.low_bit(optax.trace(0.9), min_size=1)
    stopped = {"w": jnp.ones((4, 64)).at[:, :32].set(0)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.ones((4, 64))}, state, params)
    update = jax.jit(optimizer.update)
    for _ in range(200):
        _, state = update(stopped, state, params)
    trace = lowrank_optax.decode(state.trace["w"])
    np.testing.assert_array_equal(trace[:, :32], 0)
    # The sum of a geometric series; a code of roots is up to 2 / 127 wide there.
    np.testing.assert_allclose(trace[:, 32:], 10, rtol=0.02)


def test_the_seed_of_the_rounding_is_the_users():
    params, grads = {"w": jnp.zeros((64, 64))}, gradients({"w": jnp.zeros((64, 64))}, 0)

    def codes_of(seed):
        optimizer = lowrank_optax.low_bit(optax.trace(0.9), seed=seed)
        return optimizer.update(grads, optimizer.init(params), params)[1].trace["w"]

    first, again, other = codes_of(0), codes_of(0), codes_of(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.mean(first.codes != other.codes) > 0.2


def test_a_state_follows_the_batch_to_its_devices():
    """``init`` commits nothing to a device that the parameters are not committed to."""
    params = {"w": jnp.ones((128, 64))}
    state = lowrank_optax.low_bit(optax.adamw(0.1)).init(params)
    assert not any(x.committed for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_entries_only(bad):
    params = {"w": jnp.zeros((8, 32))}
    optimizer = lowrank_optax.low_bit(optax.adam(0.1), min_size=1)
    update = jax.jit(optimizer.update)
    _, state = run(update, optimizer.init(params), params, range(2))
    good = gradients(params, 2)
    spoiled = {"w": good["w"].at[3, 5].set(bad)}
    expected, _ = update(good, state, params)
    _, state = update(spoiled, state, params)
    actual, _ = update(good, state, params)
    finite = np.isfinite(actual["w"])
    assert np.sum(~finite) == 1
    assert not finite[3, 5]
    assert expected["w"].shape == actual["w"].shape


def test_a_basis_is_not_replaced_by_that_of_a_gradient_that_is_not_finite():
    optimizer, update = jitted("galore", "packed")
    _, state = run(update, jax.jit(optimizer.init)(PARAMS), PARAMS, range(3))
    spoiled = optax.tree.full_like(PARAMS, jnp.nan)
    _, after = update(spoiled, state, PARAMS)
    for name in ("w", "layers"):
        jax.tree.map(
            np.testing.assert_array_equal,
            after[0].subspaces[name].basis,
            state[0].subspaces[name].basis,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 4},
        {"bits": 16},
        {"basis_bits": 2},
        {"block": 1},
        {"min_size": 0},
    ],
)
def test_arguments_are_checked(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        lowrank_optax.low_bit(optax.adam(0.1), **arguments)


def test_a_state_of_another_setting_is_refused_by_name():
    def state_of(*setting):
        optimizer = lowrank_optax.low_bit(OPTIMIZERS["galore"](), *setting, min_size=1)
        return optimizer.init(PARAMS)

    packed = lowrank_optax.low_bit(OPTIMIZERS["galore"](), 8, 4, min_size=1)
    grads = gradients(PARAMS, 0)
    with pytest.raises(ValueError, match=r"basis.* is linear, .* has packed"):
        packed.update(grads, state_of(8, 8), PARAMS)
    with pytest.raises(ValueError, match=r"mu.* is float32, .* has signed"):
        packed.update(grads, state_of(None, 4), PARAMS)
    plain = lowrank_optax.low_bit(OPTIMIZERS["galore"](), None, 4, min_size=1)
    with pytest.raises(ValueError, match=r"mu.* is signed, .* has float32"):
        plain.update(grads, state_of(8, 4), PARAMS)


def test_a_moment_that_grows_past_the_least_size_stays_as_it_is():
    """12 x 80 values are not coded, 16 x 80 would be: the state is trained on."""
    params = random_like({"w": (64, 80), "b": (2000,)})
    optimizer = lowrank_optax.low_bit(lowrank_optax.sumo(0.1, rank=12), min_size=1000)
    state = optimizer.init(params)
    coded = jax.tree.leaves(jax.tree.map(is_coded, state, is_leaf=is_coded))
    assert any(coded)  # the vector's moments
    grown = lowrank_optax.resize(state, 16)
    updates, after = optimizer.update(gradients(params, 0), grown, params)
    assert jax.tree.structure(after) == jax.tree.structure(grown)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("name", "setting"),
    [("adamw", "both"), ("galore", "packed"), ("accumulate", "both")],
)
def test_orbax_restores_and_training_goes_on_bitwise(name, setting, tmp_path):
    optimizer, update = jitted(name, setting)
    _, state = run(update, jax.jit(optimizer.init)(PARAMS), PARAMS, range(5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(optimizer.init, PARAMS)
        restored = checkpointer.restore(tmp_path / "state", target)
    expected = run(update, state, PARAMS, range(5, 12))
    actual = run(update, restored, PARAMS, range(5, 12))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", ["galore"])
def test_wrappers_of_optax_hold_it(name):
    optimizer, update = jitted(name, "both")
    expected, _ = run(update, jax.jit(optimizer.init)(PARAMS), PARAMS, range(4))
    wrapped = {
        "chain": optax.chain(optax.clip_by_global_norm(1e6), low_bit(name, "both")),
        "if finite": optax.apply_if_finite(low_bit(name, "both"), 3),
        "inject": optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                low_bit(name, "both"), optax.scale(learning_rate)
            )
        )(learning_rate=1.0),
    }
    for tx in wrapped.values():
        actual, _ = run(jax.jit(tx.update), tx.init(PARAMS), PARAMS, range(4))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5),
            actual,
            expected,
        )


def test_map_params_reaches_the_codes():
    optimizer = low_bit("adamw")
    state = optimizer.init(PARAMS)
    marked = optax.tree.map_params(
        optimizer, lambda x: "p", state, transform_non_params=lambda x: "other"
    )
    assert jax.tree.leaves(marked).count("other") == 1
    assert jax.tree.structure(marked) == jax.tree.structure(state)


def test_nnx_optimizer_holds_it():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(12, 40, rngs=rngs)

    transformation, _ = jitted("galore", "packed")
    *_, (actual, params, _) = nnx_trained_beside(transformation, Model(nnx.Rngs(0)), 5)
    # Another program; a code that falls the other way moves a weight by up to a step.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=2e-2),
        actual,
        params,
    )


SPECS = {"rows": P("x", None), "columns": P(None, "x")}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize(
    ("name", "spec", "mode"),
    [
        ("adamw", "rows", AxisType.Auto),
        ("adamw", "columns", AxisType.Explicit),
        ("galore", "rows", AxisType.Explicit),
        ("galore", "columns", AxisType.Auto),
    ],
)
def test_codes_do_not_depend_on_the_mesh(name, spec, mode):
    params = {"w": jnp.zeros((128, 64)), "odd": jnp.zeros((64, 40))}
    optimizer = low_bit(name, "both", block=32)
    update = jax.jit(optimizer.update)
    expected, whole = run(update, optimizer.init(params), params, range(5))

    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    sharding = NamedSharding(mesh, SPECS[spec])

    def place(tree):
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

    sharded = place(params)
    with jax.set_mesh(mesh):
        state = optimizer.init(sharded)
        placed = jax.jit(optimizer.update)
        for step in range(5):
            before = jax.tree.map(lambda x: x.sharding, state)
            updates, state = placed(place(gradients(params, step)), state, sharded)
    after = jax.tree.map(lambda x: x.sharding, state)
    if mode == AxisType.Explicit:
        assert jax.tree.map(lambda a, b: a == b, after, before)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-2, atol=5e-3),
        jax.device_get(updates),
        expected[-1],
    )

    def almost_all_equal(x, y):
        # Sums in another order may push a value over the middle of two codes.
        assert np.mean(np.asarray(x) != np.asarray(y)) < 0.02

    codes = [x.codes for x in coded_nodes(jax.device_get(state))]
    jax.tree.map(almost_all_equal, codes, [x.codes for x in coded_nodes(whole)])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 simulated devices")
@pytest.mark.parametrize(("block", "bits"), [(8, 8), (8, 4), (256, 8)])
def test_subspace_gradients_take_a_coded_basis_of_an_explicit_mesh(block, bits):
    """Scales that are cut over the mesh are spread where axes are automatic."""
    optimizer = lowrank_optax.low_bit(
        lowrank_optax.galore(0.1, RANK), 8, bits, min_size=1, block=block
    )
    params, x = {"w": jnp.ones((64, 128))}, jnp.ones((16, 64))

    def loss(params, x):
        return jnp.sum(jnp.tanh(jnp.dot(x, params["w"], out_sharding=P())))

    def coordinates(params):
        gradient = lowrank_optax.subspace_value_and_grad(loss, optimizer)
        state = jax.jit(optimizer.init)(params)
        _, state = jax.jit(optimizer.update)(gradients(params, 0), state, params)
        _, found, _ = jax.jit(gradient)(params, state, x)
        return found["w"].coordinates, lowrank_optax.decode(
            state[0].subspaces["w"].basis
        )

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "x"))
        found, basis = coordinates({"w": jax.device_put(params["w"], sharding)})
    full = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["w"])))(params)["w"]
    expected = np.asarray(full, np.float64).T @ np.asarray(basis, np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_array_says_itself_what_it_is():
    """Leaves alone, as np.savez keeps them, restore into the tree of shapes."""
    optimizer, update = jitted("galore", "packed")
    _, state = run(update, jax.jit(optimizer.init)(PARAMS), PARAMS, range(2))
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(state))
    file.seek(0)
    target = jax.tree.structure(jax.eval_shape(optimizer.init, PARAMS))
    restored = jax.tree.unflatten(target, list(np.load(file).values()))
    expected, _ = update(gradients(PARAMS, 2), state, PARAMS)
    actual, _ = update(gradients(PARAMS, 2), restored, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_root_of_a_difference_of_moments_is_refused():
    """Each is rounded by itself: nu - mu^2 would be negative somewhere."""
    params = {"w": jnp.zeros((64, 64))}
    for optimizer in (
        optax.rmsprop(0.1, centered=True),
        optax.chain(optax.scale_by_stddev(bias_correction=True), optax.scale(0.1)),
    ):
        with pytest.raises(ValueError, match=r"nu - mu\^2.*use optax.scale_by_rms"):
            lowrank_optax.low_bit(optimizer).init(params)
        lowrank_optax.low_bit(optimizer, None, 8).init(params)
    lowrank_optax.low_bit(optax.rmsprop(0.1)).init(params)
    with pytest.raises(ValueError, match=r"negative.*where moments follow a new basis"):
        lowrank_optax.scale_by_low_rank(optax.scale_by_stddev(), 4).init(params)


def test_matrices_of_a_stack_and_leaves_are_rounded_by_seeds_of_their_own():
    params = {"a": jnp.zeros((2, 3, 8, 8)), "b": jnp.zeros((8, 8))}
    state = lowrank_optax.low_bit(optax.trace(0.9), min_size=1).init(params)
    seeds = np.concatenate([np.ravel(x.seed) for x in state.trace.values()])
    assert len(np.unique(seeds)) == 7


@pytest.mark.parametrize(
    ("width", "rows"), [(2, 16), (20, 2), (31, 2), (32, 1), (40, 1)]
)
def test_rows_narrower_than_32_share_a_block_of_at_least_32(width, rows):
    optimizer = lowrank_optax.low_bit(optax.trace(0.9), min_size=1)
    state = jax.eval_shape(optimizer.init, {"w": jnp.zeros((64, width))})
    assert state.trace["w"].absmax.shape == (64 // rows, 1)
