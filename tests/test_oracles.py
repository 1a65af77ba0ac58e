"""Every method against float64 NumPy, over many refreshes, from the first step."""

import functools
import operator
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.rules.hashing import hashed, hashed_uniform
from tests import references

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 4
STEPS = 20
LEAVES = {"square": (9, 9), "stack": (2, 11, 7), "tall": (12, 8), "wide": (8, 12)}
PATHS = {f"['{name}']": name for name in LEAVES}

# Float32 against float64, in units of the largest entry. Singular vectors lose the gap,
# 0.03 of the largest singular value for the last column of a basis: 6e-8 / 0.03. Adam
# and RMS divide by the root of moments that are small: 10 times more.
ROUNDING = 5e-5
# The range finder orders by squared singular values: float32 over their smallest gap is
# ten times what an SVD's is.
SKETCH = 5e-4


class Run(NamedTuple):
    """What one optimizer did over all steps; arrays have the step as first axis."""

    updates: dict
    subspaces: dict
    inner_state: tuple


class Where(NamedTuple):
    """A matrix: the path of its leaf, and its position in the stack."""

    path: str
    place: int


class Method(NamedTuple):
    """One row of the table: an optimizer and its reference, for a side."""

    optimizer: Callable[[str], optax.GradientTransformation]
    reference: Callable[..., tuple]
    tolerance: float = ROUNDING
    sides: tuple[str, ...] = ("short", "long")


def run(optimizer: optax.GradientTransformation, grads: dict) -> Run:
    """Runs all steps in one compiled scan."""
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:], jnp.float32), grads)

    def step(state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        low_rank = next(
            x
            for x in jax.tree.leaves(state, is_leaf=_is_low_rank)
            if isinstance(x, lowrank_optax.ScaleByLowRankState)
        )
        return state, (updates, low_rank)

    in_float32 = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    scan = jax.jit(lambda g: jax.lax.scan(step, optimizer.init(params), g)[1])
    updates, low_rank = jax.device_get(scan(in_float32))
    subspaces = lowrank_optax.subspaces(low_rank)
    return Run(updates, subspaces, low_rank.inner_state)


def _is_low_rank(node):
    return isinstance(node, lowrank_optax.ScaleByLowRankState)


@functools.cache
def gradients() -> dict:
    """Drifting gradients of every leaf, (steps, *shape), float64."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in LEAVES.items():
        layers = [
            references.drifting_gradients(rng, STEPS, shape[-2:])
            for _ in range(int(np.prod(shape[:-2])))
        ]
        found[name] = np.stack(layers, axis=1).reshape(STEPS, *shape)
    return found


def draw(where: Where, seed: int, width: int, length: int, refresh: int) -> np.ndarray:
    """The documented draw: of seed, path, place in the stack, number of the refresh."""
    start = hashed(jnp.uint32(seed)) ^ jnp.uint32(zlib.crc32(where.path.encode()))
    start = hashed(hashed(start) + jnp.uint32(where.place))
    start = hashed(start + jnp.uint32(refresh))
    sketch = hashed_uniform(start, (width, length), jnp.float32)
    return np.asarray(sketch, np.float64).T


def galore(side):
    return lowrank_optax.galore(0.1, rank=RANK, update_proj_gap=5, side=side)


def galore_reference(grads, where, side, like):
    return references.galore(grads, 0.1, RANK, gap=5, side=side, like=like)


def adarankgrad(side):
    return lowrank_optax.adarankgrad(
        0.1,
        rank=RANK,
        threshold=0.1,
        side=side,
        seed=3,
        # One direction more than the rank: fewer than the gradients have, so that the
        # draw, the warm start and the loss of a sketch all show.
        basis=lowrank_optax.range_finder(1, power_iterations=1, warm_start=True),
        refresh=lowrank_optax.on_convergence(3, 7, 0.9**0.5, 0.5, check_interval=1),
    )


def adarankgrad_reference(grads, where, side, like):
    return references.adarankgrad(
        grads,
        0.1,
        RANK,
        functools.partial(draw, where, 3, RANK + 1),
        threshold=0.1,
        intervals=(3, 7),
        decay=0.5,
        check_interval=1,
        side=side,
        like=like,
        warm=True,
    )


def composed(inner, rebase, side):
    return lowrank_optax.scale_by_low_rank(
        inner,
        rank=RANK,
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(5),
        rebase=rebase,
        side=side,
        scale=0.5,
    )


def composed_reference(inner, rebase, grads, where, side, like):
    # Leaf i of n refreshes floor(i / n * interval) steps early once.
    offset = sorted(PATHS).index(where.path) * 5 // len(PATHS)
    return references.low_rank(
        grads,
        capacity=RANK,
        inner=inner,
        basis=lambda a, p, i: references.exact_svd(a, RANK),
        rank=references.fixed_rank(RANK),
        schedule=references.Every(5, offset),
        rebase=references.rebase(rebase),
        side=side,
        scale=0.5,
        like=like,
    )


def _composed(inner, reference, rebase) -> Method:
    return Method(
        functools.partial(composed, inner, rebase),
        functools.partial(composed_reference, reference, rebase),
    )


def relative_reference(inner, grads, where, side, like, *, rebase="square", lift=None):
    """``lift``: whether rows are projected -> the reference's lift."""
    rows = references.projects_rows(grads[0].shape, side)
    return references.low_rank(
        grads,
        capacity=RANK,
        inner=inner,
        basis=lambda a, p, i: references.exact_svd(a, RANK),
        rank=references.fixed_rank(RANK),
        schedule=references.Every(5, sorted(PATHS).index(where.path) * 5 // len(PATHS)),
        rebase=references.rebase(rebase),
        side=side,
        scale=-0.1,
        like=like,
        **({"lift": lift(rows)} if lift else {}),
    )


def ldadam_reference(grads, where, side, like):
    def basis(a, p, i):
        return references.power_iteration(a, p) if i else references.exact_svd(a, RANK)

    return references.low_rank(
        grads,
        capacity=RANK,
        inner=references.adam(0.908, 0.99),
        basis=basis,
        source=references.with_momentum(0.908, 0.908),
        rank=references.fixed_rank(RANK),
        schedule=references.Every(1),
        rebase=references.rebase("ldadam", 0.908, 0.99),
        side=side,
        scale=-0.1,
        like=like,
    )


def _relative(build, reference, tolerance=ROUNDING) -> Method:
    """Returns a method that projects the short side only."""
    return Method(lambda side: build(), reference, tolerance, ("short",))


def _limited(build, *, rebase="keep", raw_eps=False, **limited) -> Method:
    """Returns a method that limits what it makes of full gradients."""
    return _relative(
        build,
        functools.partial(
            relative_reference,
            references.adam(eps=1e-6, raw_eps=raw_eps),
            rebase=rebase,
            lift=lambda rows: references.Limited(**limited),
        ),
    )


def _with_residual(residual, lift) -> Method:
    """Returns momentum in a subspace, and a rule for what that does not hold."""

    def build(side):
        return lowrank_optax.scale_by_low_rank(
            optax.trace(0.9),
            RANK,
            basis=SVD,
            refresh=lowrank_optax.every(5),
            residual=residual,
            side=side,
            scale=-0.1,
        )

    reference = functools.partial(
        relative_reference, references.momentum(0.9), lift=lift
    )
    return Method(build, reference)


SVD = lowrank_optax.exact_svd()
DECAYS = (0.9, 0.999)
METHODS = {
    "sign residual": _with_residual(
        lowrank_optax.sign_residual(0.3), lambda rows: references.with_signs(0.3)
    ),
    "normalized residual": _with_residual(
        lowrank_optax.normalized_residual(0.3),
        functools.partial(references.with_unit_columns, 0.3),
    ),
    "scaled residual": _with_residual(
        lowrank_optax.scaled_residual(), lambda rows: references.Limited(True)
    ),
    "orthogonalized residual": _with_residual(
        lowrank_optax.orthogonalized_residual(0.5),
        lambda rows: references.orthogonalized_whole(0.5),
    )._replace(tolerance=SKETCH),
    # The quintic's slope at zero, 3.4445^5 = 485, enlarges what is small and inexact.
    "sumo": _relative(
        lambda: lowrank_optax.sumo(
            0.1, RANK, basis=SVD, refresh=lowrank_optax.every(5)
        ),
        functools.partial(relative_reference, references.orthogonalized_momentum()),
        SKETCH,
    ),
    "low_rank_muon": _relative(
        lambda: lowrank_optax.low_rank_muon(
            0.1, RANK, residual=0.5, basis=SVD, refresh=lowrank_optax.every(5)
        ),
        functools.partial(
            relative_reference,
            references.nesterov(),
            lift=lambda rows: references.orthogonalized_whole(0.5),
        ),
        SKETCH,
    ),
    "fira": _limited(
        lambda: lowrank_optax.fira(0.1, RANK, 5, basis=SVD),
        keeps_subspace=True,
        alpha=0.25,
        taken=0.25,
        decays=DECAYS,
    ),
    "fira with other choices": _limited(
        lambda: lowrank_optax.fira(
            0.1, RANK, 5, 0.5, taken=0.9, corrected=True, basis=SVD, rebase="square"
        ),
        keeps_subspace=True,
        alpha=0.5,
        taken=0.9,
        rebase="square",
    ),
    "apollo": _limited(
        lambda: lowrank_optax.apollo(0.1, RANK, 5, basis=SVD, raw_eps=True),
        keeps_subspace=False,
        decays=DECAYS,
        raw_eps=True,
    ),
    "apollo by matrix": _limited(
        lambda: lowrank_optax.apollo(
            0.1, RANK, 5, basis=SVD, by_matrix=True, corrected=True
        ),
        keeps_subspace=False,
        by_matrix=True,
    ),
    "ldadam": _relative(
        lambda: lowrank_optax.ldadam(0.1, RANK, start=SVD), ldadam_reference, SKETCH
    ),
    "galore": Method(galore, galore_reference),
    "adarankgrad": Method(adarankgrad, adarankgrad_reference, SKETCH),
    "momentum": _composed(optax.trace(0.9), references.momentum(0.9), "abs"),
    "lion": _composed(optax.scale_by_lion(), references.lion(), "square"),
    "rms": _composed(optax.scale_by_rms(0.9), references.rms(0.9), "square"),
}


class Comparison(NamedTuple):
    """One matrix: its run by the library, and by the reference."""

    path: str
    updates: np.ndarray
    subspace: lowrank_optax.Subspace
    inner: dict
    expected_updates: np.ndarray
    records: list[references.Record]


@functools.cache
def compared(name: str, side: str) -> list[Comparison]:
    """Runs a method and its reference on every matrix of every leaf."""
    method = METHODS[name]
    found = run(method.optimizer(side), gradients())
    inner = {f: _moment(found.inner_state, f) for f in ("mu", "trace", "nu")}
    comparisons = []
    for path, leaf in PATHS.items():
        for place, layer in enumerate(np.ndindex(*LEAVES[leaf][:-2])):
            index, where = (slice(None), *layer), Where(path, place)
            subspace = jax.tree.map(operator.itemgetter(index), found.subspaces[path])
            updates, records = method.reference(
                list(gradients()[leaf][index]), where, side, list(subspace.basis)
            )
            comparisons.append(
                Comparison(
                    path,
                    found.updates[leaf][index],
                    subspace,
                    {f: x[leaf][index] for f, x in inner.items() if x},
                    np.asarray(updates),
                    records,
                )
            )
    return comparisons


def _moment(inner_state, field):
    """Returns the tree of one moment, however deep; None: there is none."""
    trees = [x for _, x in optax.tree.get_all_with_path(inner_state, field)]
    return next((tree for tree in trees if jax.tree.leaves(tree)), None)


def assert_close(actual, expected, what, tolerance):
    """Compares in units of the largest entry."""
    expected = np.asarray(expected)
    atol = tolerance * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


every_method = pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name, method in METHODS.items() for side in method.sides],
)


@every_method
def test_updates_are_those_of_the_reference(name, side):
    for matrix in compared(name, side):
        tolerance = METHODS[name].tolerance
        assert_close(matrix.updates, matrix.expected_updates, matrix.path, tolerance)


@every_method
def test_bases_are_those_of_the_reference(name, side):
    for matrix in compared(name, side):
        expected = [record.basis for record in matrix.records]
        tolerance = METHODS[name].tolerance
        assert_close(matrix.subspace.basis, expected, matrix.path, tolerance)


@every_method
def test_moments_are_those_of_the_reference(name, side):
    for matrix in compared(name, side):
        for field, actual in matrix.inner.items():
            kind = "second" if field == "nu" else "first"
            expected = [getattr(record, kind) for record in matrix.records]
            what, tolerance = f"{matrix.path} {field}", METHODS[name].tolerance
            assert_close(actual, expected, what, tolerance)


@every_method
def test_refreshes_and_ranks_are_those_of_the_reference(name, side):
    for matrix in compared(name, side):
        refreshes = np.cumsum([record.refreshed for record in matrix.records])
        assert refreshes[-1] >= 4, "fewer than three refreshes after the first"
        np.testing.assert_array_equal(matrix.subspace.refreshes, refreshes)
        ranks = [record.rank for record in matrix.records]
        np.testing.assert_array_equal(matrix.subspace.rank, ranks)
        demands = [record.demand for record in matrix.records]
        np.testing.assert_allclose(matrix.subspace.demand, demands)


# --- inside other transformations, and with answers that are known ---------------


def _matrix_axes(params):
    """Muon's numbers: the last two axes, as the coordinates of a stack have them."""
    numbers = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda x: numbers(x.ndim - 2, x.ndim - 1), params)


def test_muon_inside_gives_nearly_orthogonal_updates_of_the_rank():
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_matrix_axes)
    tx = lowrank_optax.scale_by_low_rank(
        muon, RANK, basis=lowrank_optax.exact_svd(), refresh=lowrank_optax.every(5)
    )
    found = run(tx, gradients())
    for leaf, updates in found.updates.items():
        values = np.linalg.svd(updates, compute_uv=False)
        # Five Newton-Schulz steps bring singular values between 0.3 and 1.25, from
        # 1e-2 of the largest up: the coefficients trade accuracy for speed.
        assert np.all(values[..., :RANK] < 1.3), leaf
        assert np.all(values[..., :RANK] > 0.3), leaf
        assert np.all(values[..., RANK:] < 1e-5), leaf


RULES = {
    "range_finder": lowrank_optax.range_finder(),
    "exact_svd": lowrank_optax.exact_svd(),
}
both_rules = pytest.mark.parametrize("rule", RULES)


@functools.cache
def _sgd(rule):
    """A basis of the largest rank that is below the short side, with SGD inside."""
    return lowrank_optax.scale_by_low_rank(
        optax.sgd(0.1), rank=6, basis=RULES[rule], refresh=lowrank_optax.every(2)
    )


@both_rules
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_sgd_inside_a_basis_that_holds_the_gradient_is_sgd(rule, rank):
    rng = np.random.default_rng(rank)
    # Every step's gradient lies in the same subspaces: a basis of one holds them all.
    left, right = rng.normal(size=(10, rank)), rng.normal(size=(rank, 7))
    middle = rng.normal(size=(5, rank, rank))
    grads = {"w": left @ middle @ right}
    found = _compiled_run(rule)(grads["w"].astype(np.float32))
    # P P^T G = G to the rounding of a float32 product.
    assert_close(found, -0.1 * grads["w"], "w", tolerance=1e-5)


@functools.cache
def _compiled_run(rule):
    """Updates of all steps, for any gradients (steps, 10, 7): compiled once."""
    tx = _sgd(rule)

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1])


@both_rules
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_sgd_inside_a_square_basis_is_sgd(rule, momentum):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(6, 10, 7)), jnp.float32)
    sgd = optax.sgd(0.1, momentum)
    tx = lowrank_optax.scale_by_low_rank(
        sgd, rank=2, basis=RULES[rule], refresh=lowrank_optax.every(3)
    )
    state = tx.init(grads[0])
    # The capacity is read from the arrays: seven columns make the basis square.
    subspace = state.subspaces._replace(
        basis=jnp.asarray(np.linalg.qr(rng.normal(size=(7, 7)))[0], jnp.float32),
        rank=jnp.int32(7),
        refreshes=jnp.int32(1),
    )
    widened = jax.tree.map(
        lambda x: jnp.zeros((10, 7)) if x.shape == (10, 2) else x, state.inner_state
    )
    state = state._replace(subspaces=subspace, inner_state=widened)
    update, plain_state = jax.jit(tx.update), sgd.init(grads[0])
    for gradient in grads:
        updates, state = update(gradient, state)
        expected, plain_state = sgd.update(gradient, plain_state)
        # P P^T = I, and the momentum follows exactly, to rounding.
        assert_close(updates, expected, "w", tolerance=1e-5)
    assert int(state.subspaces.refreshes) == 2


@pytest.mark.parametrize("method", [lowrank_optax.galore, lowrank_optax.adarankgrad])
def test_weight_decay_is_decoupled_masked_and_times_the_learning_rate(method):
    params = {"decayed": jnp.full(3, 2.0), "masked": jnp.full(3, 2.0)}
    schedule = optax.linear_schedule(0.1, 0.3, 2)
    mask = {"decayed": True, "masked": False}
    tx = method(schedule, rank=2, weight_decay=0.5, mask=mask)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for learning_rate in (0.1, 0.2, 0.3):
        updates, state = tx.update(zeros, state, params)
        # Zero gradients: decay is all that is left.
        expected = -learning_rate * 0.5 * params["decayed"]
        np.testing.assert_allclose(updates["decayed"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["masked"], 0)


OUT_OF_RANGE = {
    "rank": ({"rank": 0}, "rank must be"),
    "b1": ({"b1": 1.0}, "b1"),
    "b2": ({"b2": 1.0}, "b2"),
    "eps": ({"eps": 0.0}, "eps"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay"),
}


@pytest.mark.parametrize("method", [lowrank_optax.galore, lowrank_optax.adarankgrad])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_its_documented_range_raises(method, name):
    arguments, message = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=message):
        method(1e-3, **arguments)


def test_a_gap_or_threshold_out_of_its_range_raises():
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        lowrank_optax.galore(1e-3, update_proj_gap=0)
    with pytest.raises(ValueError, match=r"threshold must be inside \(0, 1\), got 1.5"):
        lowrank_optax.adarankgrad(1e-3, threshold=1.5)
    # The rank's own threshold replaces the first use of this one, not the second.
    rank = lowrank_optax.energy_rank(8)
    with pytest.raises(ValueError, match=r"threshold must be inside \(0, 1\), got 1.5"):
        lowrank_optax.adarankgrad(1e-3, rank=rank, threshold=1.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_no_large_gradient_without_a_signal_replaces_a_basis(value):
    # 96 x 80: from 4,096 entries on, XLA's maximum on a CPU passes over NaN.
    rng = np.random.default_rng(0)
    good = jnp.asarray(rng.normal(size=(96, 80)), jnp.float32)
    bad = good.at[3, 4].set(value) if value != 0 else jnp.zeros_like(good)
    tx = lowrank_optax.scale_by_low_rank(
        optax.sgd(0.1), RANK, refresh=lowrank_optax.every(1)
    )
    update = jax.jit(tx.update)
    _, state = update(good, tx.init(good))
    _, after = update(bad, state)
    np.testing.assert_array_equal(after.subspaces.basis, state.subspaces.basis)
    assert int(after.subspaces.refreshes) == 1
