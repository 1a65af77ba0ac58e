"""Eight simulated devices: values, shardings, and what the compiled update moves."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from benchmarks.hlo import collectives
from lowrank_optax import LowRankDimensionNumbers
from tests.suite import types

pytestmark = [
    pytest.mark.usefixtures("fast_compilation"),
    pytest.mark.skipif(
        jax.device_count() < 8,
        reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
    ),
]

RANK, OVERSAMPLE, STEPS = 4, 8, 7
GRANULARITY = 2  # of those that have one
GRANULAR = ("vlorp", "projfactor")
ROWS, COLUMNS = 64, 48  # far above RANK, so that a gathered gradient stands out


class Layout(NamedTuple):
    """A parameter's shape and sharding, and those that follow for its state."""

    shape: tuple[int, ...]
    spec: P
    basis: P
    moments: P
    mesh: tuple[int, ...] = (8,)
    numbers: LowRankDimensionNumbers | None = None


HEADS = LowRankDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
# The short side is projected: the columns, but the rows of a wide matrix.
LAYOUTS = {
    "rows": Layout((ROWS, COLUMNS), P("x"), P(None, None), P("x", None)),
    "columns": Layout((ROWS, COLUMNS), P(None, "x"), P("x", None), P(None, None)),
    "stack": Layout((8, ROWS, COLUMNS), P("x"), P("x", None, None), P("x", None, None)),
    "scanned-wide": Layout(
        (2, COLUMNS, ROWS), P(None, "x"), P(None, "x", None), P(None, None, None)
    ),
    "heads": Layout(
        (ROWS, 8, 6), P(None, "x"), P("x", None), P(None, None), numbers=HEADS
    ),
    "two-axes": Layout(
        (ROWS, COLUMNS), P("x", "y"), P("y", None), P("x", None), mesh=(4, 2)
    ),
    "two-axes-heads": Layout(
        (ROWS, 8, 6),
        P("y", "x"),
        P("x", None),
        P("y", None),
        mesh=(4, 2),
        numbers=HEADS,
    ),
}
OPTIMIZERS = {
    "adarankgrad": lambda numbers: lowrank_optax.adarankgrad(
        0.1,
        RANK,
        basis=lowrank_optax.range_finder(OVERSAMPLE, warm_start=True),
        refresh=lowrank_optax.on_convergence(2, 3),
        dimension_numbers=numbers,
    ),
    "galore": lambda numbers: lowrank_optax.galore(
        0.1, RANK, update_proj_gap=3, dimension_numbers=numbers
    ),
    "vlorp": lambda numbers: lowrank_optax.vlorp(
        0.1,
        RANK,
        GRANULARITY,
        refresh=lowrank_optax.every(3),
        dimension_numbers=numbers,
    ),
    "projfactor": lambda numbers: lowrank_optax.projfactor(
        0.1,
        RANK,
        GRANULARITY,
        refresh=lowrank_optax.every(3),
        dimension_numbers=numbers,
    ),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
# Every layout with one optimizer, and with each other one those that it adds to.
PAIRS = [
    *(("adarankgrad", layout) for layout in LAYOUTS),
    *(("galore", layout) for layout in ("rows", "scanned-wide", "two-axes")),
    *(("vlorp", layout) for layout in ("columns", "stack", "two-axes-heads")),
    *(("projfactor", layout) for layout in ("rows", "heads", "scanned-wide")),
]
every_pair = pytest.mark.parametrize(("name", "layout"), PAIRS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_modes = pytest.mark.parametrize(
    "mode", [AxisType.Auto, AxisType.Explicit], ids=lambda mode: mode.name.lower()
)


def optimizer_for(name: str, layout: Layout) -> optax.GradientTransformation:
    return OPTIMIZERS[name](layout.numbers and {"w": layout.numbers})


def mesh_for(layout: Layout, mode: AxisType) -> Mesh:
    axes = ("x", "y")[: len(layout.mesh)]
    return jax.make_mesh(layout.mesh, axes, axis_types=(mode,) * len(axes))


def gradient(step: int, layout: Layout) -> np.ndarray:
    return np.random.default_rng(step).normal(size=layout.shape).astype(np.float32)


def sharded(step: int, layout: Layout, mesh: Mesh) -> dict[str, jax.Array]:
    sharding = NamedSharding(mesh, layout.spec)
    return {"w": jax.device_put(gradient(step, layout), sharding)}


class Run(NamedTuple):
    """One optimizer on one layout: compiled once, run for ``STEPS`` updates."""

    updates: list[np.ndarray]
    first_state: optax.OptState
    last_state: optax.OptState
    hlo: str


@functools.cache
def run(name: str, layout_name: str, mode: AxisType) -> Run:
    layout = LAYOUTS[layout_name]
    optimizer, mesh = optimizer_for(name, layout), mesh_for(layout, mode)
    with jax.set_mesh(mesh):
        params = sharded(0, layout, mesh)
        first = state = optimizer.init(params)
        jitted = jax.jit(optimizer.update)
        if name in GRANULAR:
            # A block of a sharded side lies on some devices only, which no sharding of
            # an output can say: updates are sharded as the parameters that they are
            # added to in a training step.
            shardings = jax.tree.map(lambda x: x.sharding, params)
            jitted = jax.jit(optimizer.update, out_shardings=(shardings, None))
        # Compiled ahead of time: it refuses a state whose shardings have changed.
        update = jitted.lower(params, state, params).compile()
        history = []
        for step in range(STEPS):
            updates, state = update(sharded(step, layout, mesh), state, params)
            history.append(np.asarray(updates["w"]))
    return Run(history, first, state, update.as_text())


@functools.cache
def single_device_run(name: str, shape: tuple, numbers) -> list[np.ndarray]:
    layout = Layout(shape, P(), P(), P(), numbers=numbers)
    optimizer = optimizer_for(name, layout)
    params = {"w": jnp.asarray(gradient(0, layout))}
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(STEPS):
        grads = {"w": jnp.asarray(gradient(step, layout))}
        updates, state = update(grads, state, params)
        history.append(np.asarray(updates["w"]))
    assert np.min(state[0].subspaces["w"].refreshes) >= 3
    return history


@both_modes
@every_pair
def test_values_are_those_of_a_single_device(name, layout, mode):
    _, shape, numbers = layout, LAYOUTS[layout].shape, LAYOUTS[layout].numbers
    expected = single_device_run(name, shape, numbers)
    # Sums over a sharded axis are added in another order: float32 rounding, enlarged by
    # the inverse Cholesky factors and by Adam's division. Updates are about 0.1.
    for actual, reference in zip(
        run(name, layout, mode).updates, expected, strict=True
    ):
        np.testing.assert_allclose(actual, reference, rtol=1e-3, atol=1e-5)


@both_modes
@every_pair
def test_a_jitted_update_keeps_the_shardings_of_the_state(name, layout, mode):
    result = run(name, layout, mode)
    _assert_same_shardings(result.last_state, result.first_state)


@both_modes
@pytest.mark.parametrize("layout", ["columns", "two-axes"])
@every_optimizer
def test_an_eager_update_keeps_the_shardings_of_the_state(name, layout, mode):
    layout = LAYOUTS[layout]
    optimizer, mesh = optimizer_for(name, layout), mesh_for(layout, mode)
    with jax.set_mesh(mesh):
        params = sharded(0, layout, mesh)
        state = optimizer.init(params)
        updates, new_state = optimizer.update(params, state, params)
    assert types(updates) == types(params)
    _assert_same_shardings(new_state, state)


def _assert_same_shardings(actual, expected):
    assert types(actual) == types(expected)

    def check(path, x, y):
        # Under automatic axes P("x") and P("x", None) are the same.
        same = x.sharding.is_equivalent_to(y.sharding, y.ndim)
        assert same, f"{jax.tree_util.keystr(path)}: {x.sharding} != {y.sharding}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


@both_modes
@every_pair
def test_init_shards_the_basis_as_the_projected_side_and_the_moments_as_the_other(
    name, layout, mode
):
    layout = LAYOUTS[layout]
    mesh = mesh_for(layout, mode)
    with jax.set_mesh(mesh):
        state = optimizer_for(name, layout).init(sharded(0, layout, mesh))[0]
    # A random basis is not stored.
    for basis in jax.tree.leaves(state.subspaces["w"].basis):
        assert basis.sharding == NamedSharding(mesh, layout.basis)
    inner = state.inner_state
    moments = (
        [inner.mu["w"], inner.nu["w"]] if name != "projfactor" else [inner.mu["w"]]
    )
    for moment in moments:
        assert moment.sharding == NamedSharding(mesh, layout.moments)


@every_pair
def test_traced_init_gives_the_explicit_shardings_of_init(name, layout):
    layout = LAYOUTS[layout]
    optimizer, mesh = optimizer_for(name, layout), mesh_for(layout, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = sharded(0, layout, mesh)
        state = optimizer.init(params)
        traced = jax.jit(optimizer.init)(params)
    _assert_same_shardings(traced, state)


@every_optimizer
def test_an_explicit_mesh_needs_no_set_mesh(name):
    layout = LAYOUTS["columns"]
    optimizer, mesh = optimizer_for(name, layout), mesh_for(layout, AxisType.Explicit)
    params = sharded(0, layout, mesh)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected = single_device_run(name, layout.shape, layout.numbers)
    for step, reference in enumerate(expected):
        updates, new_state = update(sharded(step, layout, mesh), state, params)
        # A scalar that comes out on a mesh was on it before.
        assert types(new_state) == types(state)
        np.testing.assert_allclose(updates["w"], reference, rtol=1e-3, atol=1e-5)
        state = new_state


AROUND = {
    "accumulate": lambda tx: lowrank_optax.accumulate(tx, 2),
    "low_bit": lambda tx: lowrank_optax.low_bit(tx, 8, 8, min_size=1),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("around", AROUND)
def test_without_set_mesh_a_scan_carries_the_state_and_a_condition_chooses_it(around):
    layout = LAYOUTS["rows"]
    optimizer = AROUND[around](optimizer_for("galore", layout))
    mesh = mesh_for(layout, AxisType.Explicit)

    def trained(params):
        def step(carry, factor):
            params, state = carry
            grads = jax.tree.map(lambda x: factor * x, params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.ones(4)))(carry)
        return params["w"]

    alone = trained({"w": jnp.asarray(gradient(0, layout))})
    # A code may fall the other way.
    tolerance = 1e-2 if around == "low_bit" else 1e-4
    np.testing.assert_allclose(trained(sharded(0, layout, mesh)), alone, atol=tolerance)


def _gathered(x):
    return jax.lax.with_sharding_constraint(x, P(None, None))


@pytest.mark.parametrize(
    ("program", "outside", "inside"),
    [
        (lambda x, p: _gathered(x), [64 * 48], []),
        (lambda x, p: jax.lax.cond(p, _gathered, lambda x: 2 * x, x), [], [64 * 48]),
        (lambda x, p: jax.lax.cond(p, lambda x: 2 * x, _gathered, x), [64 * 48], []),
        (lambda x, p: x.T @ x, [48 * 48], []),
        (
            lambda x, p: jax.lax.fori_loop(0, 3, lambda i, x: x @ (x.T @ x), x),
            [48 * 48],
            [],
        ),
        (
            lambda x, p: jax.lax.with_sharding_constraint(x, P(None, "x")),
            [64 * 48],
            [],
        ),
    ],
    ids=["gather", "if-true", "if-false", "reduce", "loop", "transpose"],
)
def test_the_parser_finds_collectives(program, outside, inside):
    mesh = mesh_for(LAYOUTS["rows"], AxisType.Auto)
    with jax.set_mesh(mesh):
        x = sharded(0, LAYOUTS["rows"], mesh)["w"]
        hlo = jax.jit(program).lower(x, jnp.bool_(True)).compile().as_text()
    found_outside, found_inside = collectives(hlo)
    assert [x.numbers for x in found_outside] == outside
    assert [x.numbers for x in found_inside] == inside


def test_the_parser_finds_groups_runs_and_bytes():
    mesh = jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2)

    def program(x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ (x.T @ x)), x)
        moved = jax.lax.with_sharding_constraint(x, P("x", "y"))
        return jax.lax.with_sharding_constraint(moved, P("x", None)), moved

    x = jnp.ones((64, 48), jnp.float32, device=NamedSharding(mesh, P("y", None)))
    with jax.set_mesh(mesh):
        hlo = jax.jit(program).lower(x).compile().as_text()
    found = {x.kind: x for x in collectives(hlo)[0]}
    summed, gathered = found["all-reduce"], found["all-gather"]
    assert (summed.numbers, summed.group, summed.trips) == (48 * 48, 4, 3)
    assert (gathered.numbers, gathered.group, gathered.trips) == (32 * 48, 4, 1)
    # A ring sends each part but one, and to add up it does so twice.
    assert summed.sent == 2 * 3 / 4 * (4 * 48 * 48)
    assert gathered.sent == 3 / 4 * (4 * 32 * 48)


@both_modes
@every_pair
def test_outside_a_refresh_no_collective_comes_near_the_size_of_a_gradient(
    name, layout, mode
):
    outside, _ = collectives(run(name, layout, mode).hlo)
    limit = math.prod(LAYOUTS[layout].shape) / 4
    assert not [x for x in outside if x.numbers >= limit]


@both_modes
@every_layout
def test_a_refresh_by_range_finder_moves_no_more_than_its_sketches(layout, mode):
    _, inside = collectives(run("adarankgrad", layout, mode).hlo)
    assert inside
    stack = math.prod(LAYOUTS[layout].shape) // (ROWS * COLUMNS)
    limit = stack * (ROWS + COLUMNS) * (RANK + OVERSAMPLE)
    assert not [x for x in inside if x.numbers > limit]


@both_modes
def test_a_refresh_by_svd_gathers_the_gradient_and_is_seen_to(mode):
    _, inside = collectives(run("galore", "columns", mode).hlo)
    assert max(x.numbers for x in inside) >= ROWS * COLUMNS
