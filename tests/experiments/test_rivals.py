"""The methods to compare with: each beside plain loops over one matrix in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from experiments.errors import UserError
from experiments.optim.foam import scale_by_foam
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.options import OptimizerOptions, with_defaults
from experiments.optim.stable_spam import scale_by_stable_spam
from experiments.run.config import parse
from tests import references

pytestmark = pytest.mark.usefixtures("fast_compilation")

STEPS, RATE = 7, 0.1
# Of a stack, a pooler, and a stack with an odd number of inputs.
SHAPES = {"up": (2, 12, 8), "pooler": (8, 8), "odd": (2, 9, 6)}


def gradients(shapes=None, steps=STEPS):
    """Trees whose norms and largest entries jump."""
    rng = np.random.default_rng(0)
    for t in range(steps):
        yield {
            name: (1 + 5 * (t == 3)) * rng.standard_t(2, size=shape).astype(np.float32)
            for name, shape in (shapes or SHAPES).items()
        }


def made(name, **flags):
    options = OptimizerOptions(optimizer=name, rank=3, **flags)
    filled = with_defaults(options, steps=10, hidden_size=16)
    options = dataclasses.replace(options, **filled)
    own = {key: getattr(options, key) for key in OPTIMIZERS[name].own}
    adam = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    return OPTIMIZERS[name].make(
        lambda _: RATE, seed=0, weight_decay=0.0, **adam, **own
    )


def updates_of(tx, grads):
    state = tx.init(jax.tree.map(jnp.zeros_like, grads[0]))
    update = jax.jit(tx.update)
    for grad in grads:
        found, state = update(grad, state, grad)
        yield found


def matrices(trees):
    """The runs of each matrix, by name: leaf, place in the stack."""
    for name, leaf in sorted(trees[0].items()):
        for place in range(len(leaf)) if leaf.ndim == 3 else (...,):
            run = [np.asarray(tree[name][place], np.float64) for tree in trees]
            yield f"{name}[{place}]", run


def adam(moments, x, b1=0.8, b2=0.95, eps=1e-6):
    """Kingma and Ba; moments: m, v, updates done."""
    m, v, t = moments
    m, v, t = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x**2, t + 1
    return (m, v, t), m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def stable_spam(grads, reset_every):
    most = norm = square = 0.0
    moments = (0.0, 0.0, 0)
    for t, grad in enumerate(grads, 1):
        g, largest = grad.copy(), np.abs(grad).max()
        most = 0.999 * most + 0.001 * largest
        threshold = most / (1 - 0.999**t)
        for i in np.ndindex(g.shape):
            if abs(g[i]) > threshold:
                g[i] = g[i] / largest * threshold
        size = np.sqrt(np.sum(g**2))
        norm = 0.7 * norm + 0.3 * size
        square = 0.9 * square + 0.1 * size**2
        ratio = norm / (1 - 0.7**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-6)
        if reset_every and t % reset_every == 0:
            moments = (0.0, 0.0, 0)
        moments, update = adam(moments, g / size * ratio)
        yield -RATE * update


def scale(grads):
    for g in grads:
        unit = np.stack([column / np.linalg.norm(column) for column in g.T], 1)
        yield -RATE * 0.2 * unit * np.sqrt(unit.size / np.sum(unit**2))


def foam(grads, level=2):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        size = 2**level
        while len(g) % size:
            size //= 2
        groups = [range(i, i + size) for i in range(0, len(g), size)]
        means = np.array([np.mean(g[group], 0) for group in groups])
        m, v = 0.8 * m + 0.2 * means, 0.95 * v + 0.05 * means**2
        update = np.empty_like(g)
        for j, group in enumerate(groups):
            for i in group:
                rest = g[i] - means[j]
                root = np.sqrt(v[j] / (1 - 0.95**t) + rest**2)
                update[i] = (m[j] / (1 - 0.8**t) + rest) / (root + 1e-6)
        yield -RATE * update


def momentum_free_muon(grads):
    for g in grads:
        yield -RATE * references.orthogonalized(g, 0.2)


def muon(grads, beta):
    inner, m = references.orthogonalized_momentum(beta), 0.0
    for t, g in enumerate(grads, 1):
        update, m, _ = inner(g, m, None, t)
        yield -RATE * update


def frugal(grads, weight):
    found, _ = references.low_rank(
        grads,
        capacity=3,
        inner=references.adam(0.8, 0.95, 1e-6),
        basis=lambda a, p, i: references.exact_svd(a, 3),
        rank=references.fixed_rank(3),
        schedule=references.Every(4),
        rebase=references.rebase("zero"),
        lift=references.with_signs(weight),
    )
    return [-RATE * update for update in found]


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("stable_spam", {"reset_every": 3}, lambda g: stable_spam(g, 3)),
        ("stable_spam", {"reset_every": 0}, lambda g: stable_spam(g, 0)),
        ("scale", {}, scale),
        ("foam", {}, foam),
        ("muon", {"momentum": 0.0}, momentum_free_muon),
        ("muon", {"momentum": 0.5}, functools.partial(muon, beta=0.5)),
    ],
)
def test_updates_are_those_of_the_equations(name, flags, expected):
    grads = list(gradients())
    found = list(updates_of(made(name, **flags), grads))
    for (path, actual), (_, run) in zip(matrices(found), matrices(grads), strict=True):
        wanted = np.asarray(list(expected(run)))
        # 1 - 0.999^t has four digits in float32.
        np.testing.assert_allclose(actual, wanted, 2e-5, 2e-6, err_msg=path)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_frugal_adds_signs_to_adam_in_a_subspace(weight):
    rng = np.random.default_rng(0)
    runs = [references.drifting_gradients(rng, STEPS, (12, 8)) for _ in range(2)]
    grads = [
        {"up": np.stack(pair).astype(np.float32)} for pair in zip(*runs, strict=True)
    ]
    tx = made("frugal", update_proj_gap=4, residual=weight)
    found = list(updates_of(tx, grads))
    for (path, actual), (_, run) in zip(matrices(found), matrices(grads), strict=True):
        wanted = np.asarray(frugal(run, 1.0 if weight is None else weight))
        # A residual near zero has a sign by rounding.
        apart = ~np.isclose(actual, wanted, rtol=1e-3, atol=1e-4)
        assert np.mean(apart) < 0.01, path


@pytest.mark.parametrize("name", ["stable_spam", "scale", "foam"])
def test_sharded_updates_are_those_of_one_device(name):
    # Of 12 folded inputs 3 are left, which 2 devices do not divide.
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    (grads,) = gradients({"up": (2, 12, 8)}, steps=1)
    (expected,) = updates_of(made(name), [grads])
    tx = made(name)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "x", "y"))
        sharded = jax.device_put(grads, {"up": sharding})
        whole = NamedSharding(mesh, P())
        state = jax.jit(tx.init, out_shardings=whole)(sharded)
        state = jax.tree.map(
            lambda x: jax.device_put(x, sharding) if x.shape == (2, 12, 8) else x, state
        )
        found, _ = jax.jit(tx.update)(sharded, state, sharded)
    assert found["up"].sharding.is_equivalent_to(sharding, 3)
    # Sums in another order.
    np.testing.assert_allclose(found["up"], expected["up"], rtol=1e-4, atol=1e-7)


def test_level_zero_is_adam():
    grads = list(gradients())
    tx, plain = scale_by_foam(0), optax.scale_by_adam()
    for actual, wanted in zip(
        updates_of(tx, grads), updates_of(plain, grads), strict=True
    ):
        for name in SHAPES:
            np.testing.assert_allclose(actual[name], wanted[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["stable_spam", "foam"])
def test_vectors_and_narrow_leaves_have_updates_of_their_own_kind(name):
    leaves = {"w": jnp.ones((4, 6), jnp.bfloat16), "b": jnp.arange(6.0)}
    (found,) = updates_of(made(name), [leaves])
    for key, leaf in leaves.items():
        assert (found[key].shape, found[key].dtype) == (leaf.shape, leaf.dtype)
    (still,) = updates_of(made(name), [jax.tree.map(jnp.zeros_like, leaves)])
    assert not any(np.any(x) for x in jax.tree.leaves(still))


def test_states_are_as_small_as_they_say():
    params = {"up": jnp.zeros((2, 64, 64))}
    methods = {name: made(name) for name in ("stable_spam", "scale", "foam")}
    methods["muon"] = made("muon", momentum=0.0)
    numbers = {
        name: sum(x.size for x in jax.tree.leaves(tx.init(params)))
        for name, tx in methods.items()
    }
    count = 2 * 64 * 64
    # With counters: of the averages, of Adam, of the schedule.
    assert numbers == {
        "stable_spam": 2 * count + 3 * 2 + 3,
        "scale": 1,
        "foam": 2 * count // 4 + 2,
        "muon": 1,
    }


def test_moments_take_8_bits():
    params = {"up": jnp.zeros((2, 64, 64))}
    for name in ("stable_spam", "foam"):
        state = lowrank_optax.low_bit(made(name), min_size=1).init(params)
        coded = optax.tree.get_all_with_path(state, "codes")
        assert len(coded) == 2, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stable_spam --reset-every -1", "--reset-every must be 0 or more"),
        ("foam --fold-level -1", "--fold-level must be 0 or more"),
        ("frugal --residual -1", "--residual must be 0 or more"),
        ("scale --rank 4", "--rank has no effect: scale has no such option"),
        ("adamw --fold-level 2", "--fold-level has no effect: adamw has no"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(["--optimizer", *arguments.split()])
    assert "\n" not in str(caught.value)


def test_resets_can_be_left_out():
    grads = list(gradients(steps=3))
    never, zero = (
        updates_of(scale_by_stable_spam(reset_every=every), grads)
        for every in (None, 0)
    )
    for a, b in zip(never, zero, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
