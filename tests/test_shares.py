"""Newton-Schulz over a mesh: whole matrices to each device, and the same values."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from benchmarks.hlo import collectives
from lowrank_optax.matrix.shares import Split, split_of
from lowrank_optax.rules.newton_schulz import orthogonalized, orthogonalized_by_factor

pytestmark = [
    pytest.mark.usefixtures("fast_compilation"),
    pytest.mark.skipif(
        jax.device_count() < 8,
        reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
    ),
]

RANK, ROWS, COLUMNS = 4, 64, 48
CUT = P(None, "fsdp")
METHODS = {"sumo": lowrank_optax.sumo, "low_rank_muon": lowrank_optax.low_rank_muon}


def mesh_of(lengths=(2, 4), count=None):
    names = ("data", "fsdp", "tensor")[: len(lengths)]
    types = (AxisType.Auto,) * len(lengths)
    return jax.make_mesh(lengths, names, types, devices=jax.devices()[:count])


def stack_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("stack", "mesh", "expected"),
    [
        ((), {"data": 2, "fsdp": 4}, None),
        ((1,), {"data": 2, "fsdp": 4}, None),
        ((0,), {"data": 2}, None),
        ((8,), {}, None),
        ((8,), {"data": 1}, None),
        ((8,), {"data": 2, "fsdp": 4}, Split(0, ("data", "fsdp"), 8)),
        # Another device would have no matrix that others lack.
        ((4,), {"data": 4, "fsdp": 4}, Split(0, ("fsdp",), 4)),
        ((2,), {"data": 2, "fsdp": 4}, Split(0, ("fsdp",), 4)),
        ((6,), {"data": 2, "fsdp": 4}, Split(0, ("data", "fsdp"), 8)),
        ((32,), {"data": 8, "fsdp": 8, "tensor": 1}, Split(0, ("data", "fsdp"), 64)),
        # Three quarters of the devices would have zeros alone.
        ((2,), {"data": 8}, None),
        ((2, 16), {"data": 8}, Split(1, ("data",), 16)),
    ],
)
def test_a_split_leaves_each_device_the_fewest_matrices(stack, mesh, expected):
    assert split_of(stack, mesh) == expected


@pytest.mark.parametrize("stack", [(8,), (6,), (2, 5)], ids=str)
@pytest.mark.parametrize("spec", [P(), CUT], ids=["on all", "cut"])
def test_orthogonal_factors_are_those_of_one_device(stack, spec):
    x, mesh = stack_of(*stack, 16, 40), mesh_of()

    def both(x):
        tall = jnp.swapaxes(x, -1, -2)
        of_tall = orthogonalized_by_factor(tall, 5)
        of_wide = orthogonalized_by_factor(x, 5)
        return orthogonalized(x, 5), of_wide, jnp.swapaxes(of_tall, -1, -2)

    expected = jax.jit(lambda x: orthogonalized(x, 5))(x)
    with jax.set_mesh(mesh):
        spec = P(*[None] * (len(stack) - 1), *spec)
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        jitted = jax.jit(both)
        found = jitted(placed)
        assert "sharding_constraint" in jitted.lower(placed).as_text()
    for each in found:
        # float32 rounding, of singular values that five iterations enlarge.
        np.testing.assert_allclose(each, expected, atol=2e-5)


def test_under_vmap_and_outside_jit_the_values_are_the_same():
    x, mesh = stack_of(3, 8, 16, 24), mesh_of()
    expected = orthogonalized(x, 5)
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.vmap(lambda x: orthogonalized(x, 5)))(x)
        eager = orthogonalized(jnp.asarray(x), 5)
    np.testing.assert_allclose(mapped, expected, atol=2e-5)
    np.testing.assert_array_equal(eager, expected)


@pytest.mark.parametrize("name", METHODS)
def test_no_mesh_one_device_and_shard_map_leave_the_program_as_it_is(name):
    tx = METHODS[name](0.1, RANK)
    params = {"w": jnp.ones((8, 16, 12)), "wide": jnp.ones((8, 3, 12))}

    def lowered(update):
        state = tx.init(params)
        return jax.jit(update).lower(params, state, params).as_text()

    def update(*args):
        return tx.update(*args, refresh=False)

    with jax.set_mesh(mesh_of()):
        assert "sharding_constraint" in lowered(update)
    with jax.set_mesh(mesh_of((1, 1), 1)):
        on_one = lowered(update)
    manual = jax.shard_map(
        update, mesh=mesh_of(), in_specs=P(), out_specs=P(), check_vma=False
    )
    for text in (lowered(update), on_one, lowered(manual)):
        assert "sharding_constraint" not in text


def compiled(name, layers, ns_steps=5, spec=CUT):
    """Returns an update compiled on (2, 4), and its state's shardings before it."""
    mesh = mesh_of()
    tx = METHODS[name](0.1, RANK, ns_steps=ns_steps)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        shape = (layers, ROWS, COLUMNS)
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
        shardings = lowrank_optax.state_shardings(tx, params)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            shardings,
        )
        # The updates have the shardings of the parameters that they are added to.
        update = jax.jit(
            lambda *args: tx.update(*args, refresh=False),
            out_shardings=({"w": sharding}, None),
        )
        return update.lower(params, state, params).compile(), state


def kinds(program):
    return Counter(x.kind for x in collectives(program.as_text())[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sumo", {"all-to-all": 1, "all-gather": 1}),
        # The update is gathered over the axis that has only the batch.
        ("low_rank_muon", {"all-to-all": 2, "all-gather": 1}),
    ],
)
def test_collectives_depend_neither_on_layers_nor_on_iterations(name, expected):
    program, state = compiled(name, layers=8)
    found = collectives(program.as_text())[0]
    assert kinds(program) == expected
    size = 8 * ROWS * (RANK if name == "sumo" else COLUMNS)
    # Each exchange is among the four devices that have one matrix together.
    gathered = 8 * RANK**2 if name == "sumo" else size // 4
    limits = {"all-to-all": size // 2, "all-gather": gathered}
    assert all(x.numbers == limits[x.kind] for x in found)
    assert kinds(compiled(name, layers=16, ns_steps=7)[0]) == expected
    assert kinds(compiled(name, layers=2)[0]).total() == 2
    # Nothing asked for these shardings: the shares have not reached the state.
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
        state,
        program.output_shardings[1],
    )


def test_an_operand_that_all_devices_have_is_not_moved_before_the_work():
    program, _ = compiled("sumo", layers=8, spec=P())
    (only,) = collectives(program.as_text())[0]
    assert (only.kind, only.numbers) == ("all-gather", 8 * RANK**2)


def test_data_parallel_steps_move_no_more_than_both_sides_times_the_rank():
    mesh, tx = mesh_of((8,)), lowrank_optax.sumo(0.1, RANK)
    sharding = NamedSharding(mesh, P())
    params = {"w": jnp.ones((8, ROWS, ROWS), device=sharding)}
    state = jax.device_put(tx.init(params), sharding)
    x = jnp.ones((16, ROWS), device=NamedSharding(mesh, P("data")))

    def loss(params, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0])

    def step(params, state, x):
        gradient = lowrank_optax.subspace_value_and_grad(loss, tx)
        _, grads, state = gradient.keeping(params, state, x)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=sharding)
        program = jitted.lower(params, state, x).compile()
    found = collectives(program.as_text())[0]
    # The gradient's a r numbers, which the backward loop adds up, and r^2.
    moved = sum(x.numbers * (x.trips or 0) for x in found)
    assert moved == 8 * (ROWS * RANK + RANK**2)
