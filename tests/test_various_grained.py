"""Random bases, granularity, ProjFactor and accumulation against float64 NumPy."""

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from tests import references

RANK = 3
GAP = 2  # updates between two draws
STEPS = 7  # the first draw and three redraws
SEED = 4
SIGMAS = 5.0  # one entry in two million lies farther out by chance
# 5 divides one side only, the short one of the tall leaf; no b / c is below 5.
LEAVES = {"squares": (2, 24, 24), "tall": (28, 25), "wide": (22, 27), "bias": (5,)}
BASES = {
    "gaussian": lowrank_optax.gaussian(),
    "rademacher": lowrank_optax.rademacher(),
}
# Not the defaults: an epsilon that counts shows where it stands.
FACTORS = {"b1": 0.8, "b2": 0.9, "eps": 0.01}

# Float32 against float64, in units of the largest entry: 6e-8, for a few tens of them.
ROUNDING = 2e-6
# Re-basing adds 1e-6 of its mean diagonal to P^T P, whose condition is up to 16 here.
REBASED = 2e-5
# Adam divides by the root of 1 - 0.999^t: 6e-8 / 1e-3 / 2 at the first update.
CORRECTION = 5e-5

# Most of the time goes into compiling.
pytestmark = pytest.mark.usefixtures("fast_compilation")

both_distributions = pytest.mark.parametrize("distribution", BASES)


def assert_close(actual, expected, what, tolerance=ROUNDING):
    """Compares in units of the largest entry."""
    expected = np.asarray(expected)
    atol = tolerance * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def draw(
    distribution: str,
    leaf: str,
    length: int,
    refresh: int,
    seed: int = SEED,
    rank: int = RANK,
    place: int = 0,
) -> np.ndarray:
    """The documented draw: of seed, path, place in the stack, number of the refresh."""
    path = zlib.crc32(f"['{leaf}']".encode())
    drawn = _draw(distribution, (length, rank), seed, np.uint32(path), place, refresh)
    return np.asarray(drawn, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(distribution, shape, seed, path, place, refresh):
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (path, place, refresh):
        key = jax.random.fold_in(key, number)
    return BASES[distribution].draw(key, shape, jnp.float32)


# --- against the references --------------------------------------------------------


class Case(NamedTuple):
    """One optimizer; ``granularity`` is the one that is asked for."""

    method: str
    side: str
    granularity: int
    distribution: str
    rebase: str = "first"

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        build = {"vlorp": lowrank_optax.vlorp, "projfactor": lowrank_optax.projfactor}
        return build[self.method](
            0.1,
            RANK,
            self.granularity,
            basis=BASES[self.distribution],
            refresh=lowrank_optax.every(GAP, stagger=False),
            rebase=self.rebase,
            side=self.side,
            seed=SEED,
            **self.factors(),
        )

    def reference(self, grads, leaf, place=0, projected=None) -> tuple[list, list]:
        return getattr(references, self.method)(
            grads,
            0.1,
            draw=functools.partial(draw, self.distribution, leaf, place=place),
            gap=GAP,
            granularity=self.granularity,
            side=self.side,
            rule=self.rebase,
            projected=projected,
            **self.factors(),
        )

    def factors(self) -> dict:
        return FACTORS if self.method == "projfactor" else {}

    @property
    def leaves(self) -> tuple[str, str]:
        """The matrices that it is run on: all three would take half as long again."""
        return ("tall" if self.granularity == 5 else "squares", "wide")

    @property
    def tolerance(self) -> float:
        """Of updates; projfactor's have a correction by 1 - 0.9^t."""
        return CORRECTION if self.method == "vlorp" else REBASED


# Every side with every granularity, distribution and rule, not all with all of them.
SETTINGS = (
    ("short", 1, "gaussian", "first"),
    ("short", 5, "rademacher", "first"),
    ("long", 1, "rademacher", "keep"),
    ("long", 2, "rademacher", "first"),
    ("long", 5, "gaussian", "first"),
)
CASES = [
    *(Case("vlorp", *setting) for setting in SETTINGS),
    Case("vlorp", "short", 2, "gaussian", "square"),
    *(Case("projfactor", *setting) for setting in SETTINGS if setting[1] != 2),
    Case("projfactor", "short", 2, "gaussian", "keep"),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(map(str, case))
)


@functools.cache
def gradients(case: Case, steps: int) -> dict:
    """Gradients with a mean and noise, (steps, *shape), float64; a vector as well."""
    rng = np.random.default_rng(0)
    drawn = {
        leaf: rng.normal(size=shape) + rng.normal(size=(steps, *shape))
        for leaf, shape in LEAVES.items()
    }
    return {leaf: drawn[leaf] for leaf in (*case.leaves, "bias")}


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def scan_of(optimizer: optax.GradientTransformation) -> Callable:
    """Gradients of all steps -> updates, and states of the low-rank transformation."""

    @jax.jit
    def scan(grads):
        params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)

        def step(state, gradients):
            updates, state = optimizer.update(gradients, state, params)
            return state, (updates, state[0])

        return jax.lax.scan(step, optimizer.init(params), grads)[1]

    return lambda grads: jax.device_get(scan(in_float32(grads)))


@functools.cache
def compiled(case: Case) -> Callable:
    return scan_of(case.optimizer())


@functools.cache
def found(case: Case) -> tuple[dict, Any]:
    return compiled(case)(gradients(case, STEPS))


class Matrix(NamedTuple):
    """One matrix: its name, where its steps lie in a leaf, and its reference."""

    leaf: str
    index: tuple
    updates: list[np.ndarray]
    records: list[references.Moments]


@functools.cache
def expected(case: Case) -> list[Matrix]:
    return expected_of(case, gradients(case, STEPS))


def expected_of(case: Case, grads: dict) -> list[Matrix]:
    """Runs the reference on every matrix of every leaf."""
    matrices = []
    for leaf in case.leaves:
        for place, layer in enumerate(np.ndindex(*LEAVES[leaf][:-2])):
            index = (slice(None), *layer)
            made = case.reference(list(grads[leaf][index]), leaf, place)
            matrices.append(Matrix(leaf, index, *made))
    return matrices


@every_case
def test_updates_are_those_of_the_reference(case):
    updates, _ = found(case)
    for matrix in expected(case):
        actual = updates[matrix.leaf][matrix.index]
        assert_close(actual, matrix.updates, matrix.leaf, case.tolerance)


@every_case
def test_first_moments_are_those_of_the_reference(case):
    _, state = found(case)
    for matrix in expected(case):
        actual = state.inner_state.mu[matrix.leaf][matrix.index]
        firsts = [record.first for record in matrix.records]
        assert_close(actual, firsts, matrix.leaf, REBASED)


@every_case
def test_second_moments_are_those_of_the_reference(case):
    _, state = found(case)
    inner = state.inner_state
    for matrix in expected(case):
        seconds = [record.second for record in matrix.records]
        if case.method == "vlorp":
            actual = inner.nu[matrix.leaf][matrix.index]
            tolerance = REBASED if case.rebase == "square" else ROUNDING
            assert_close(actual, seconds, matrix.leaf, tolerance)
            continue
        rows, columns = zip(*seconds, strict=True)
        assert_close(inner.v_row[matrix.leaf][matrix.index], rows, matrix.leaf)
        assert_close(inner.v_col[matrix.leaf][matrix.index], columns, matrix.leaf)


@every_case
def test_random_bases_are_drawn_when_due_and_not_stored(case):
    _, state = found(case)
    for leaf in case.leaves:
        subspace, shape = state.subspaces[leaf], LEAVES[leaf]
        assert not jax.tree.leaves(subspace.basis)
        due = np.arange(STEPS) // GAP + 1
        layers = np.prod(shape[:-2], dtype=int)
        actual = np.reshape(subspace.refreshes, (STEPS, layers))
        np.testing.assert_array_equal(actual, np.stack([due] * layers, axis=1))


def test_bases_of_the_oracles_are_well_conditioned():
    for case in CASES:
        for matrix in expected(case):
            for record in matrix.records:
                # The tolerance counts with the square of it.
                assert np.linalg.cond(record.basis) <= 4.0


@pytest.mark.parametrize("method", ["vlorp", "projfactor"])
def test_vectors_and_matrices_too_small_at_their_granularity_have_adam(method):
    rng = np.random.default_rng(1)
    # b / c is 6 at granularity 1, and 3, which is not above the rank, at 2.
    grads = {"bias": rng.normal(size=(3, 5)), "small": rng.normal(size=(3, 9, 6))}
    coarse, fine = (Case(method, "short", c, "gaussian") for c in (1, 2))
    params = {"bias": jnp.ones(5), "small": jnp.ones((9, 6))}
    subspaces = lowrank_optax.subspaces(coarse.optimizer().init(params))
    assert list(subspaces) == ["['small']"]
    updates, _ = scan_of(fine.optimizer())(grads)
    step = references.adam(**fine.factors())
    for name, gradient in grads.items():
        m = v = np.zeros(gradient.shape[1:])
        plain = []
        for t, g in enumerate(gradient, start=1):
            n, m, v = step(g, m, v, t)
            plain.append(-0.1 * n)
        assert_close(updates[name], plain, name, CORRECTION)


def test_cutting_puts_pieces_of_a_row_below_each_other():
    g = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(references.cut(g, 3), np.reshape(g, (6, 2)))
    np.testing.assert_array_equal(references.paste(references.cut(g, 3), 3), g)


@pytest.mark.parametrize("method", ["vlorp", "projfactor"])
def test_momentum_of_a_singular_rademacher_basis_follows_to_the_nearest_one(method):
    # Three columns of four signs: every eighth pair of columns is collinear.
    ranks = [
        np.linalg.matrix_rank(draw("rademacher", "w", 4, 0, seed)) for seed in range(30)
    ]
    seed = ranks.index(RANK - 1)
    grads = {"w": np.random.default_rng(2).normal(size=(2, 12, 4))}
    build = getattr(lowrank_optax, method)
    refresh = lowrank_optax.every(1, stagger=False)
    tx = build(0.1, RANK, 1, basis=BASES["rademacher"], refresh=refresh, seed=seed)
    updates, state = scan_of(tx)(grads)
    _, records = getattr(references, method)(
        list(grads["w"]),
        0.1,
        draw=functools.partial(draw, "rademacher", "w", seed=seed),
        gap=1,
    )
    assert np.all(np.isfinite(updates["w"]))
    # M lies in the span of the rows of P, where what is added to P^T P, 1e-6, is small;
    # rounding turns 6e-8 of it out, which 6e-8 / 1e-6 does not make large.
    actual = state.inner_state.mu["w"]
    assert_close(actual, [record.first for record in records], "mu", tolerance=1e-4)


# --- draws -------------------------------------------------------------------------

DRAWS = 4000


@functools.cache
def draws(distribution: str) -> np.ndarray:
    """Bases (DRAWS, 6, RANK) of as many refreshes of one leaf, float64."""
    key = jax.random.fold_in(jax.random.key(SEED), zlib.crc32(b"['w']"))
    key = jax.random.fold_in(key, 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(DRAWS))
    drawn = BASES[distribution].draw(keys, (6, RANK), jnp.float32)
    return np.asarray(drawn, np.float64)


@both_distributions
def test_the_mean_of_p_p_transposed_is_the_identity(distribution):
    bases = draws(distribution)
    mean = np.mean(bases @ np.swapaxes(bases, 1, 2), axis=0)
    # Variance of sum_k p_ik p_jk: r terms of variance 1 / r^2 for i != j; for i = j of
    # 2 / r^2 for normal entries and of 0 for signs, whose squares are all 1 / r.
    of_diagonal = {"gaussian": 2 / RANK, "rademacher": 0.0}[distribution]
    variance = np.where(np.eye(6) == 1, of_diagonal, 1 / RANK)
    error = np.sqrt(variance / DRAWS)  # 0.009 off the diagonal
    # 1e-6: rounding of a diagonal that has no variance.
    assert np.all(np.abs(mean - np.eye(6)) <= SIGMAS * error + 1e-6)


@both_distributions
def test_entries_have_the_mean_and_the_fourth_moment_of_their_distribution(
    distribution,
):
    entries = draws(distribution).ravel() * RANK**0.5
    # E x = 0 with variance 1; E x^4 = 3 with variance 105 - 9, or 1 without any.
    fourth, variance = {"gaussian": (3, 96), "rademacher": (1, 0)}[distribution]
    assert abs(np.mean(entries)) <= SIGMAS / np.sqrt(entries.size)
    error = np.sqrt(variance / entries.size)
    # 1e-6: float32 of 1 / sqrt(r), to the fourth power.
    assert abs(np.mean(entries**4) - fourth) <= SIGMAS * error + 1e-6


def test_columns_of_a_draw_and_following_draws_are_uncorrelated():
    bases = draws("gaussian") * RANK**0.5
    # Means of products of independent normals: variance 1 / DRAWS.
    bound = SIGMAS / np.sqrt(DRAWS)
    between_columns = np.mean(bases[:, :, 0] * bases[:, :, 1], axis=0)
    between_draws = np.mean(bases[1:] * bases[:-1], axis=0)
    assert np.all(np.abs(between_columns) <= bound)
    assert np.all(np.abs(between_draws) <= bound * np.sqrt(DRAWS / (DRAWS - 1)))


@functools.cache
def lifted(distribution: str) -> Any:
    """Seed -> G P P^T of four updates, two leaves of one G and a redraw between."""
    gradient = jnp.asarray(np.random.default_rng(3).normal(size=(12, 8)), jnp.float32)
    grads = {"a": gradient, "b": gradient, "stack": jnp.stack([gradient, gradient])}

    @jax.jit
    def updates_of(seed):
        tx = lowrank_optax.scale_by_low_rank(
            optax.identity(),
            RANK,
            basis=BASES[distribution],
            refresh=lowrank_optax.every(2, stagger=False),
            seed=seed,
        )

        def step(state, _):
            updates, state = tx.update(grads, state)
            return state, updates

        return jax.lax.scan(step, tx.init(grads), length=4)[1]

    return updates_of


@both_distributions
def test_draws_depend_on_seed_leaf_place_and_refresh_and_on_nothing_else(distribution):
    updates, again, other = (lifted(distribution)(seed) for seed in (7, 7, 8))
    first, second = updates["a"][0], updates["a"][2]
    for same in (updates["a"][1], again["a"][0]):
        np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(second, updates["a"][3])
    for different in (second, updates["b"][0], other["a"][0], updates["stack"][0, 0]):
        # Far from one another, not in the last bits: the norm of G is about 10.
        assert np.linalg.norm(first - different) > 1.0
    # Layers of a stack have draws of their own: their errors average out.
    for layers in updates["stack"]:
        assert np.linalg.norm(layers[0] - layers[1]) > 1.0


# --- what projecting and lifting costs ---------------------------------------------

SAMPLES = 20_000
LONG = 32  # b
BUDGET = 8  # c r
GRAINS = ((1, 8), (2, 4), (4, 2), (8, 1))


class Sampled(NamedTuple):
    """Estimates G P P^T: their mean, and their squared errors in units of ||G||^2."""

    gradient: np.ndarray
    mean: np.ndarray
    errors: np.ndarray


@functools.cache
def sampled(distribution: str, c: int, r: int) -> Sampled:
    """Lifts one projected gradient with as many seeds, by the library's updates."""
    gradient = np.random.default_rng(5).normal(size=(9, LONG)).astype(np.float32)

    def estimate(seed):
        tx = lowrank_optax.scale_by_low_rank(
            optax.identity(),
            r,
            basis=BASES[distribution],
            side="long",
            granularity=c,
            seed=seed,
        )
        return tx.update(gradient, tx.init(gradient))[0]

    @jax.jit
    def estimates(seeds):
        lifted = jax.vmap(estimate)(seeds)
        errors = jnp.sum((lifted - gradient) ** 2, axis=(1, 2))
        return jnp.mean(lifted, axis=0), errors / jnp.sum(gradient**2)

    mean, errors = jax.device_get(estimates(jnp.arange(SAMPLES)))
    return Sampled(gradient.astype(float), mean, errors.astype(float))


SIGN = {"gaussian": 1, "rademacher": -1}
every_grain = pytest.mark.parametrize(("c", "r"), GRAINS)


@both_distributions
@every_grain
def test_lifting_a_projection_is_unbiased(distribution, c, r):
    gradient, mean, _ = sampled(distribution, c, r)
    pieces = references.cut(gradient, c)
    # Of entry j of a piece g: (||g||^2 + g_j^2) / r, or minus for signs, which keep
    # g_j itself exactly.
    square = np.sum(pieces**2, axis=1, keepdims=True)
    variance = references.paste((square + SIGN[distribution] * pieces**2) / r, c)
    error = np.sqrt(variance / SAMPLES)
    assert np.all(np.abs(mean - gradient) <= SIGMAS * error)


@both_distributions
@every_grain
def test_variance_of_lifting_a_projection_is_that_of_the_formula(distribution, c, r):
    """E ||G P P^T - G||^2 = (b / c + 1) / r ||G||^2, for signs (b / c - 1) / r."""
    errors = sampled(distribution, c, r).errors
    expected = (LONG / c + SIGN[distribution]) / r
    deviation = np.std(errors) / np.sqrt(SAMPLES)
    # The bound can tell the formulas with +1, 0 and -1 apart.
    assert SIGMAS * deviation < 0.5 / r
    assert abs(np.mean(errors) - expected) <= SIGMAS * deviation


def test_finer_is_worse_for_normal_entries_and_better_for_signs_at_a_fixed_budget():
    """With M = c r numbers per row: b / M + 1 / r, and b / M - 1 / r for signs.

    The paper says that finer, a larger c and a smaller r, estimates better. For its own
    Gaussian bases it is the other way round: the part b / M does not depend on c, and
    the rest, (b + c) / (c r) in all, grows as r falls. Signs have what is claimed.
    """
    for distribution, sign in SIGN.items():
        means, deviations = [], []
        for c, r in GRAINS:
            assert c * r == BUDGET
            errors = sampled(distribution, c, r).errors
            means.append(np.mean(errors))
            deviations.append(np.std(errors) / np.sqrt(SAMPLES))
        # From one (c, r) to the next 1 / r grows by at least 1 / 8.
        steps = sign * np.diff(means)
        deviations = np.hypot(deviations[1:], deviations[:-1])
        assert np.all(steps > SIGMAS * deviations), (distribution, means)


# --- accumulation ------------------------------------------------------------------

MICRO = 3  # micro-batches of a window, which is a step
ACCUMULATED = (
    Case("vlorp", "long", 2, "rademacher"),
    Case("projfactor", "short", 1, "gaussian"),
)
accumulated_cases = pytest.mark.parametrize(
    "case", ACCUMULATED, ids=lambda case: case.method
)


@functools.cache
def weights() -> np.ndarray:
    return np.random.default_rng(6).uniform(0.2, 3.0, size=STEPS * MICRO)


@functools.cache
def means(case: Case) -> dict:
    """The weighted mean gradient of each window, (STEPS, *shape)."""
    return {
        leaf: np.asarray(references.window_means(grads, weights(), MICRO))
        for leaf, grads in gradients(case, STEPS * MICRO).items()
    }


@functools.cache
def accumulated(case: Case) -> dict:
    """Updates of all micro-batches, (STEPS, MICRO, *shape)."""
    acc = lowrank_optax.accumulate(case.optimizer(), MICRO)
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), means(case))

    def step(state, micro):
        updates, state = acc.update(micro[0], state, params, weight=micro[1])
        return state, updates

    scan = jax.jit(lambda micros: jax.lax.scan(step, acc.init(params), micros)[1])
    updates = jax.device_get(
        scan(in_float32((gradients(case, STEPS * MICRO), weights())))
    )
    return jax.tree.map(lambda x: x.reshape(STEPS, MICRO, *x.shape[1:]), updates)


@functools.cache
def added(case: Case) -> tuple[dict, dict]:
    """Updates and sums of each window, by ``add`` and ``finish``."""
    acc = lowrank_optax.accumulate(case.optimizer(), MICRO)
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), means(case))

    def add(state, micro):
        return acc.add(micro[0], state, weight=micro[1]), None

    def window(state, micros):
        state, _ = jax.lax.scan(add, state, micros)
        updates, after = acc.finish(state, params)
        return after, (updates, state.sums)

    windows = jax.tree.map(
        lambda x: x.reshape(STEPS, MICRO, *x.shape[1:]),
        in_float32((gradients(case, STEPS * MICRO), weights())),
    )
    scan = jax.jit(lambda micros: jax.lax.scan(window, acc.init(params), micros)[1])
    return jax.device_get(scan(windows))


@accumulated_cases
def test_only_the_last_micro_batch_of_a_window_updates(case):
    for leaf, updates in accumulated(case).items():
        assert not np.any(updates[:, :-1]), leaf
        assert np.all(np.any(updates[:, -1] != 0, axis=-1)), leaf


@accumulated_cases
def test_accumulated_updates_are_those_of_the_reference_with_the_mean(case):
    for matrix in expected_of(case, means(case)):
        actual = accumulated(case)[matrix.leaf][:, -1][matrix.index]
        assert_close(actual, matrix.updates, matrix.leaf, case.tolerance)


@accumulated_cases
def test_accumulated_updates_are_those_with_the_mean_gradient(case):
    plain, _ = compiled(case)(means(case))
    for leaf, updates in accumulated(case).items():
        assert_close(updates[:, -1], plain[leaf], leaf)


@accumulated_cases
def test_adding_and_finishing_is_updating(case):
    updates, _ = added(case)
    for leaf, actual in updates.items():
        assert_close(actual, accumulated(case)[leaf][:, -1], leaf)


@accumulated_cases
def test_sums_of_a_window_are_its_projected_weighted_sum(case):
    _, sums = added(case)
    total = np.sum(weights().reshape(STEPS, MICRO), axis=1)
    for matrix in expected_of(case, means(case)):
        mean = means(case)[matrix.leaf][matrix.index]
        rows = references.projects_rows(mean.shape[1:], case.side)
        exact = []
        for weight, gradient, record in zip(total, mean, matrix.records, strict=True):
            oriented = gradient.T if rows else gradient
            c = references.divisor(oriented.shape[1], case.granularity)
            exact.append(weight * references.cut(oriented, c) @ record.basis)
        found = sums[matrix.leaf].coordinates[matrix.index]
        assert_close(found, exact, matrix.leaf)


@accumulated_cases
def test_a_new_seed_for_every_micro_batch_is_something_else(case):
    """The authors' code on a refresh step: projections of different bases, added."""
    grads, w = gradients(case, STEPS * MICRO)["wide"], weights()
    rows = references.projects_rows(LEAVES["wide"], case.side)

    def projected(t, p):
        total, first = 0.0, t * MICRO
        for i in range(first, first + MICRO):
            # All but the last draw of a refresh step are gone when it is lifted.
            gone = t % GAP == 0 and i < first + MICRO - 1
            basis = draw(case.distribution, "wide", len(p), 100 + i) if gone else p
            g = grads[i].T if rows else grads[i]
            c = references.divisor(g.shape[1], case.granularity)
            total = total + w[i] * references.cut(g, c) @ basis
        return total / np.sum(w[first : first + MICRO])

    faulty, _ = case.reference(list(means(case)["wide"]), "wide", projected=projected)
    actual = accumulated(case)["wide"][:, -1]
    with pytest.raises(AssertionError, match="wide"):
        assert_close(actual, faulty, "wide", case.tolerance)
    # By as much as the updates themselves, not by a rounding that grew.
    assert np.linalg.norm(actual - faulty) > 0.3 * np.linalg.norm(actual)


class Window(NamedTuple):
    """GaLore, accumulated: gradients, updates and bases, (STEPS, MICRO, ...)."""

    grads: np.ndarray
    updates: np.ndarray
    bases: np.ndarray


both_gaps = pytest.mark.parametrize("gap", [1, 2])


@functools.cache
def galore_windows(gap: int, silent: int | None = None) -> Window:
    """The first micro-batch of the window ``silent`` has a gradient of zeros."""
    tx = lowrank_optax.galore(0.1, RANK, update_proj_gap=gap)
    acc = lowrank_optax.accumulate(tx, MICRO)
    rng = np.random.default_rng(8)
    grads = references.drifting_gradients(rng, STEPS * MICRO, (12, 8))
    if silent is not None:
        grads[silent * MICRO] = 0.0
    params = {"w": jnp.ones((12, 8))}

    def step(state, micro):
        gradient, weight = micro
        updates, state = acc.update({"w": gradient}, state, params, weight=weight)
        basis = lowrank_optax.subspaces(state)["['w']"].basis
        return state, (updates["w"], basis)

    scan = jax.jit(lambda micros: jax.lax.scan(step, acc.init(params), micros)[1])
    updates, bases = jax.device_get(scan(in_float32((grads, weights()))))
    shape = (STEPS, MICRO)
    return Window(
        grads.reshape(*shape, 12, 8),
        updates.reshape(*shape, 12, 8),
        bases.reshape(*shape, 8, RANK),
    )


@both_gaps
def test_a_computed_basis_is_that_of_the_first_micro_batch_of_a_window(gap):
    windows = galore_windows(gap)
    for t, bases in enumerate(windows.bases):
        due = t - t % gap
        basis, _ = references.exact_svd(windows.grads[due, 0], RANK)
        # Singular vectors have no sign: P P^T has none either. They lose the gap, 0.03
        # of the largest singular value: 6e-8 / 0.03, and some roundings.
        actual, expected = bases[0] @ bases[0].T, basis @ basis.T
        assert_close(actual, expected, f"window {t}", tolerance=2e-5)


@both_gaps
def test_a_computed_basis_does_not_change_inside_a_window(gap):
    bases = galore_windows(gap).bases
    for micro in range(1, MICRO):
        np.testing.assert_array_equal(bases[:, micro], bases[:, 0])
    # It does change between windows, each time that it is due.
    changed = [np.any(b != a) for a, b in itertools.pairwise(bases)]
    assert changed == [(t + 1) % gap == 0 for t in range(STEPS - 1)]


def test_a_first_micro_batch_without_a_signal_leaves_its_whole_window_the_old_basis():
    # Due at windows 0, 2 and 4; window 3 makes good what 2 has missed.
    bases = galore_windows(2, silent=2).bases
    changed = [np.any(b != a, axis=(1, 2)) for a, b in itertools.pairwise(bases)]
    windows = [t for t, micros in enumerate(changed, start=1) if np.any(micros)]
    assert windows == [3, 5]
    np.testing.assert_array_equal(bases[2], bases[1])


@both_gaps
def test_accumulated_galore_is_the_reference_in_bases_of_first_micro_batches(gap):
    windows = galore_windows(gap)
    flat = windows.grads.reshape(STEPS * MICRO, 12, 8)
    updates, _ = references.low_rank(
        references.window_means(flat, weights(), MICRO),
        capacity=RANK,
        inner=references.adam(eps=1e-6),
        basis=lambda a, p, i: references.exact_svd(windows.grads[i * gap, 0], RANK),
        rank=references.fixed_rank(RANK),
        schedule=references.Every(gap),
        rebase=references.rebase("keep"),
        scale=0.25,
        like=list(windows.bases[:, 0]),
    )
    assert_close(windows.updates[:, -1], -0.1 * np.asarray(updates), "w", CORRECTION)


# --- the sums of ProjFactor --------------------------------------------------------


@functools.cache
def first_update(rank: int, c: int) -> Any:
    """(gradients, seeds) -> updates and states after one update, with b2 = 0."""

    def of_one(gradient, seed):
        tx = lowrank_optax.scale_by_projfactor(rank, c, b2=0.0, seed=seed)
        update, state = tx.update({"w": gradient}, tx.init({"w": gradient}))
        return update["w"], state.inner_state

    return jax.jit(jax.vmap(of_one))


@pytest.mark.parametrize(("rank", "c"), [(3, 5), (7, 2)])
def test_sums_are_those_of_the_squared_lifted_gradient(rank, c):
    gradient = np.random.default_rng(9).normal(size=(30, 20))
    seeds = range(8)
    batch = jnp.stack([jnp.asarray(gradient, jnp.float32)] * len(seeds))
    _, state = first_update(rank, c)(batch, jnp.asarray(seeds))
    fine = references.cut(gradient, c)
    for seed in seeds:
        p = draw("gaussian", "w", fine.shape[1], 0, seed, rank)
        squares = (fine @ p @ p.T) ** 2
        # Of float32 quadratic forms with at most 49 terms, none negative in sum.
        assert_close(state.v_row["w"][seed], squares.sum(axis=1), "rows")
        assert_close(state.v_col["w"][seed], squares.sum(axis=0), "columns")


def orthogonal_to_a_lifted_column(p: np.ndarray) -> np.ndarray:
    """A row g with (g P P^T)_0 = 0 and no other zero."""
    normal = p @ p[0]
    g = np.random.default_rng(10).normal(size=len(p))
    return g - normal * (g @ normal) / (normal @ normal)


def least_lifted(p: np.ndarray) -> np.ndarray:
    """The row in the span of P that g P P^T shrinks most."""
    return np.linalg.svd(p, full_matrices=False)[0][:, -1]


@pytest.mark.parametrize("row", [orthogonal_to_a_lifted_column, least_lifted])
def test_sums_that_cancel_are_not_negative_and_updates_are_finite(row):
    seeds = range(200)
    scales = np.random.default_rng(11).normal(size=(30, 1))
    grads = [
        scales * row(draw("gaussian", "w", 20, 0, seed, rank=19)) for seed in seeds
    ]
    updates, state = first_update(19, 1)(
        jnp.asarray(np.stack(grads), jnp.float32), jnp.asarray(seeds)
    )
    assert np.min(state.v_row["w"]) >= 0
    assert np.min(state.v_col["w"]) >= 0
    assert np.all(np.isfinite(updates))


def test_a_zero_gradient_gives_zero_updates():
    updates, state = first_update(3, 1)(jnp.zeros((1, 30, 20)), jnp.arange(1))
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(state.v_row["w"], 0)
