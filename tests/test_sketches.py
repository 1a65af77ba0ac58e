"""Sketches: what they estimate, the bases made of them, and what no program holds."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from benchmarks.hlo import collectives
from lowrank_optax import subspace_value_and_grad, train_step
from lowrank_optax.binding.optimizer import bind
from lowrank_optax.binding.states import low_rank_states, slots_of
from lowrank_optax.rules.bases import captured_energies
from lowrank_optax.sketch import omega_of, omegas_of, width_of
from tests.suite import random_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 2


def low_rank(rank=RANK, **options):
    return lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), rank, **options)


def only_node(optimizer, params):
    """The low-rank state of an optimizer, and its projectors."""
    (node,) = (x for x in low_rank_states(optimizer.init(params)) if slots_of(x))
    return node, bind(optimizer, params).projectors(params, node)


def drawn(shapes, refreshes=None):
    """Test matrices of 6 rows' width by leaf, behind these numbers of refreshes."""
    node, projectors = only_node(low_rank(1, side="short"), random_like(shapes))
    slots = slots_of(node)
    for path, slot in slots.items():
        more = (refreshes or {}).get(path[-1].key, 0)
        slots[path] = slot._replace(refreshes=slot.refreshes + more)
    found = omegas_of(projectors, slots, 5)
    return {path[-1].key: np.asarray(x) for path, x in found.items()}


def reference(n, width, seed):
    """A random part of the orthonormal cosine transform, float64."""
    rows = np.arange(n)[:, None]
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(n)[:width]
    cosines = np.cos(np.pi * (2 * rows + 1) * chosen / (2 * n)) * (2 / n) ** 0.5
    cosines *= np.where(chosen == 0, 0.5**0.5, 1)
    return draw.choice([-1, 1], (n, 1)) * cosines * (n / width) ** 0.5


@pytest.mark.parametrize(("n", "width"), [(20, 6), (20, 20), (1000, 7), (70_001, 3)])
def test_columns_of_a_test_matrix_are_orthogonal(n, width):
    drawn = omega_of(jnp.uint32(3), n, width, jnp.float32)
    found = np.asarray(drawn, np.float64)
    # Cosines in float32; above 46,340 rows an angle overflows unless it is cut.
    np.testing.assert_allclose(
        found.T @ found, np.eye(width) * n / width, atol=2e-6 * n
    )
    like = reference(n, width, 0)
    np.testing.assert_allclose(like.T @ like, np.eye(width) * n / width, atol=1e-9 * n)


def test_a_test_matrix_is_one_in_expectation():
    """E[Omega Omega^T] = I: the mean of 400 draws, within five deviations."""
    count, n, width = 400, 12, 4
    found = jax.vmap(lambda seed: omega_of(seed, n, width, np.float32))(
        jnp.arange(count, dtype=jnp.uint32)
    )
    mean = np.mean([x @ x.T for x in found], 0)
    expected = [x @ x.T for x in (reference(n, width, i) for i in range(count))]
    deviation = np.std(expected, 0) / count**0.5
    assert np.all(np.abs(mean - np.eye(n)) < 5 * deviation + 1e-6)


def test_leaves_of_one_shape_and_layers_share_a_test_matrix_up_to_a_renewal():
    shapes = {"w": (20, 7), "layers": (2, 20, 9), "v": (30, 7)}
    first = drawn(shapes)
    assert [first[name].shape for name in shapes] == [(20, 6), (20, 6), (30, 6)]
    np.testing.assert_array_equal(first["w"], first["layers"])
    # Of one layer of two alone.
    renewed = drawn(shapes, {"layers": np.array([0, 1])})
    for name in shapes:
        assert np.max(np.abs(renewed[name] - first[name])) > 0.5
    np.testing.assert_array_equal(renewed["w"], renewed["layers"])


def test_sketches_add_up_to_that_of_the_sum():
    def loss(params, x):
        return jnp.sum(jnp.sin(x @ params["w"]))

    params = random_like({"w": (20, 12)})
    optimizer = low_rank()
    state = optimizer.init(params)
    sketching = subspace_value_and_grad(loss, optimizer).sketching()
    x = random_like({"x": (30, 20)}, 1)["x"]
    parts = [sketching(params, state, part)[3]["['w']"].rows for part in (x[:9], x[9:])]
    whole = sketching(params, state, x)[3]["['w']"].rows
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "basis", [lowrank_optax.range_finder(), lowrank_optax.exact_svd()]
)
def test_a_basis_of_a_sketch_captures_nearly_what_one_of_the_gradient_does(basis):
    """Singular values 1, 1/2, 1/4, ...: by a sketch of 16 rows 0.2 % is lost at most.

    0.2 % is twice the most of 20 seeds by the reference in float64.
    """
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 24)))[0] for n in (64, 24))
    matrix = jnp.asarray(left * 0.5 ** np.arange(24) @ right.T, jnp.float32)
    params = {"w": jnp.zeros((64, 24))}
    optimizer = low_rank(4, basis=basis)
    gradient = subspace_value_and_grad(lambda p: jnp.sum(p["w"] * matrix), optimizer)
    state = optimizer.init(params)
    *_, sketches = gradient.sketching(oversample=12)(params, state)
    state = gradient.renewed(params, state, sketches)
    found = lowrank_optax.subspaces(state)["['w']"]
    best = 1 - 0.25**4
    assert 0.998 * best < float(jnp.sum(captured_energies(matrix, found.basis)))
    assert (int(found.refreshes), int(found.age)) == (1, 0)


def test_ranks_by_energy_follow_a_sketch():
    """A gradient of three directions demands three columns of eight."""
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(rng.normal(size=(64, 3)) @ rng.normal(size=(3, 24)))
    params = {"w": jnp.zeros((64, 24))}
    rule = lowrank_optax.energy_rank(8, 0.01, min_rank=1, smoothing=0.0)
    optimizer = low_rank(rule)
    gradient = subspace_value_and_grad(lambda p: jnp.sum(p["w"] * matrix), optimizer)
    state = optimizer.init(params)
    *_, sketches = gradient.sketching()(params, state)
    state = gradient.renewed(params, state, sketches)
    assert lowrank_optax.ranks(state)["['w']"] == 3


def two_losses(params, x):
    return jnp.sum(jnp.sin(x @ params["a"])) + jnp.sum(jnp.cos(x @ params["b"]))


def test_only_what_is_due_and_sketched_is_renewed():
    params = random_like({"a": (20, 12), "b": (20, 12)})
    x = random_like({"x": (9, 20)}, 1)["x"]
    optimizer = low_rank(refresh=lowrank_optax.every(2, stagger=False))
    gradient = subspace_value_and_grad(two_losses, optimizer)
    state = optimizer.init(params)

    def counts(state):
        slots = lowrank_optax.subspaces(state)
        return [int(slots[name].refreshes) for name in ("['a']", "['b']")]

    *_, sketches = gradient.sketching("['a']")(params, state, x)
    assert list(sketches) == ["['a']"]
    state = gradient.renewed(params, state, sketches)
    assert counts(state) == [1, 0]
    # Nothing is due now but b.
    _, _, state, sketches = gradient.sketching()(params, state, x)
    state = gradient.renewed(params, state, sketches)
    assert counts(state) == [1, 1]
    again = gradient.renewed(params, state, sketches)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_sketch_of_nothing_keeps_the_basis_and_is_tried_again(value):
    params = random_like({"w": (20, 12)})
    optimizer = low_rank(refresh=lowrank_optax.every(1, stagger=False))
    gradient = subspace_value_and_grad(
        lambda p, s: s * jnp.sum(p["w"] @ jnp.ones(12)), optimizer
    )
    state = optimizer.init(params)
    _, grads, state, sketches = gradient.sketching()(params, state, 1.0)
    state = gradient.renewed(params, state, sketches)
    _, state = optimizer.update(grads, state, params, refresh=False)
    before = lowrank_optax.subspaces(state)["['w']"]
    *_, sketches = gradient.sketching()(params, state, jnp.float32(value))
    after = lowrank_optax.subspaces(gradient.renewed(params, state, sketches))["['w']"]
    np.testing.assert_array_equal(after.basis, before.basis)
    assert (int(after.refreshes), int(after.failures)) == (1, 1)


def test_bad_calls_are_refused():
    params, x = random_like({"a": (20, 12), "b": (20, 12)}), jnp.ones((9, 20))
    optimizer = low_rank()
    gradient = subspace_value_and_grad(two_losses, optimizer)
    with pytest.raises(ValueError, match=r"sketching names c, which have no"):
        gradient.sketching("c")(params, optimizer.init(params), x)
    optimizer = low_rank(basis=lowrank_optax.power_iteration())
    gradient = subspace_value_and_grad(two_losses, optimizer)
    with pytest.raises(ValueError, match=r"\['a'\]: power_iteration blends"):
        gradient.sketching()(params, optimizer.init(params), x)


# Of a scanned LLaMA-like block; no side is a number of tokens or a width of a sketch.
LAYERS, TOKENS, D, F = 2, 40, 48, 112
SHAPES = {"up": (LAYERS, D, F), "down": (LAYERS, F, D)}
FULL = D * F


def scanned_loss(params, x):
    def layer(x, params):
        return x + jnp.tanh(x @ params["up"]) @ params["down"], None

    return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)


DOT = re.compile(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(.*")


def full_size_products(text):
    """Products whose result is as large as a gradient, of a layer or of the stack."""
    found = []
    for match in DOT.finditer(text):
        size = math.prod(int(n) for n in match[1].split(",") if n)
        is_product = " dot(" in match[0] or "matmul" in match[0]
        if is_product and size in (FULL, LAYERS * FULL):
            found.append(match[0])
    return found


def programs(refresh, micro_batches=1):
    """Renews -> text of the compiled step."""
    optimizer = optax.chain(low_rank(8), optax.scale_by_learning_rate(1e-2))
    step = train_step(
        scanned_loss, optimizer, refresh=refresh, micro_batches=micro_batches
    )
    params, x = random_like(SHAPES), jnp.ones((TOKENS, D))
    state = step.init(params)
    return {
        renews: step.lower(params, state, x, renews=renews).compile().as_text()
        for renews in (False, True)
    }


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_no_program_multiplies_a_full_gradient(micro_batches):
    """The one product of full size of each leaf is the lift of its update."""
    found = programs("sketch", micro_batches)
    assert len(full_size_products(found[False])) == len(SHAPES)
    assert len(full_size_products(found[True])) == len(SHAPES)
    if micro_batches == 1:
        # The search does find full gradients, where there are some.
        found = programs("full")
        assert len(full_size_products(found[True])) > len(SHAPES)


def test_data_parallel_training_reduces_sketches_and_coordinates_only():
    """(a + b) k numbers a matrix at most, in a step that renews too."""
    mesh = jax.make_mesh((8,), ("data",))
    whole = NamedSharding(mesh, P())
    rank = 8
    optimizer = optax.chain(low_rank(rank), optax.scale_by_learning_rate(1e-2))
    step = train_step(scanned_loss, optimizer)
    params = jax.device_put(random_like(SHAPES), whole)
    state = step.init(params)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(state))
    x = jax.device_put(jnp.ones((8 * TOKENS, D)), NamedSharding(mesh, P("data")))
    node, projectors = only_node(optimizer, params)
    assert node is not None
    widths = {width_of(projector, None) for projector in projectors.values()}
    assert widths == {2 * rank}
    for renews in (False, True):
        text = step.lower(params, state, x, renews=renews).compile().as_text()
        moved = sum(
            one.numbers * (one.trips or 1) for kind in collectives(text) for one in kind
        )
        # The loss and a few scalars come on top.
        assert moved <= len(SHAPES) * LAYERS * (D + F) * 2 * rank + 100, renews
        if not renews:
            assert moved <= len(SHAPES) * LAYERS * (D + F) * rank + 100


@pytest.mark.parametrize(
    ("shape", "side", "oversample", "width"),
    [
        ((20, 7), "short", None, 10),
        ((20, 7), "short", 99, 20),
        ((20, 7), "long", 99, 7),
    ],
)
def test_a_sketch_has_at_most_the_rows_of_its_gradient(shape, side, oversample, width):
    _, projectors = only_node(low_rank(5, side=side), random_like({"w": shape}))
    (projector,) = projectors.values()
    assert width_of(projector, oversample) == width
