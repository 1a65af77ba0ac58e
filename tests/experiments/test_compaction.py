"""Columns of an encoder's state are cut while it is tuned, and grow again."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax
from experiments.optim.compaction import LOOKS, Compaction

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 8
# An encoder's block matrices: stacks of few layers, and a pooler without a stack.
SHAPES = {
    "blocks": {"attention": {"query": (2, 24, 24)}, "mlp": {"up": (2, 24, 40)}},
    "pooler": {"kernel": (24, 24)},
}
PARAMS = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
PATHS = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(PARAMS)]


@functools.cache
def optimizer():
    """The rank that one gradient asks for, at each update."""
    return lowrank_optax.adarankgrad(
        0.1,
        lowrank_optax.energy_rank(RANK, 1e-4, min_rank=1, smoothing=0.0),
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(1, stagger=False),
    )


@functools.cache
def fresh() -> Any:
    return optimizer().init(PARAMS)


def using(state: Any, rank: int, demand: float | None = None) -> Any:
    """Returns a state as behind refreshes by gradients of a rank.

    The demand is below the rank where a floor adds to it.
    """

    def of(slot):
        used = min(rank, slot.basis.shape[-1])
        wanted = used if demand is None else demand
        return slot._replace(
            rank=jnp.full_like(slot.rank, used),
            demand=jnp.full_like(slot.demand, wanted),
        )

    is_slot = lambda x: isinstance(x, lowrank_optax.Subspace)  # noqa: E731
    return jax.tree.map(lambda x: of(x) if is_slot(x) else x, state, is_leaf=is_slot)


def looked(state: Any, compaction: Compaction, rank: int, most: int | None = RANK):
    """Returns the state behind the looks up to a decision."""
    for _ in range(LOOKS):
        state = compaction.look(using(state, rank), has_budget=False, most=most)
    return state


def columns(state: Any) -> list[int]:
    found = lowrank_optax.capacities(state)
    return [found[path] for path in PATHS]


def test_columns_follow_the_rank_down_and_up_again_with_one_to_spare():
    state, compaction = fresh(), Compaction()
    seen = []
    for rank in (3, 4, 8, 8, 8, 8, 8, 2):
        state = looked(state, compaction, rank)
        seen.append(columns(state))
    # 3 and one to spare. 4 is all that there is: so on to the rank of the run.
    assert seen == [[n] * 3 for n in (4, 5, 6, 7, 8, 8, 8, 3)]


@pytest.mark.parametrize(("demand", "kept"), [(2, 4), (3, 4), (3.5, 5)])
def test_columns_of_the_floor_are_to_spare(demand, kept):
    state, compaction = using(fresh(), 4, demand), Compaction()
    for _ in range(LOOKS):
        state = compaction.look(state, has_budget=False, most=RANK)
    assert columns(state) == [kept] * 3


def test_the_largest_rank_of_all_looks_is_kept():
    state, compaction = fresh(), Compaction()
    for rank in (3, 6, 3, 3):
        assert columns(state) == [RANK] * 3
        state = compaction.look(using(state, rank), has_budget=False, most=RANK)
    assert columns(state) == [7] * 3


def test_where_columns_are_freed_for_good_none_come_back():
    """As in pre-training: a rank rule cannot ask for more columns than there are."""
    state = lowrank_optax.resize(using(fresh(), 3), 3)
    assert columns(looked(state, Compaction(), 8, most=None)) == [3] * 3


def test_what_frees_little_frees_nothing():
    # One leaf has two columns to spare: one of them is less than 10 % of all bytes.
    kept = dict(zip(PATHS, (4, 4, 5), strict=True))
    state = lowrank_optax.resize(using(fresh(), 3), kept)
    assert columns(looked(state, Compaction(), 3)) == [4, 4, 5]
    # Beside a leaf that grows it costs nothing.
    state = lowrank_optax.resize(state, {PATHS[0]: 3})
    assert columns(looked(state, Compaction(), 3)) == [4, 4, 4]


def test_buckets_are_an_eighth_of_the_rank():
    rule = lowrank_optax.energy_rank(20, 1e-4, min_rank=1)
    state = lowrank_optax.adarankgrad(0.1, rule).init(PARAMS)
    assert columns(looked(state, Compaction(), 5, most=20)) == [6] * 3
    assert columns(looked(state, Compaction(), 6, most=20)) == [8] * 3
    assert columns(looked(state, Compaction(), 19, most=20)) == [20] * 3


def gradients(step, rank):
    rng = np.random.default_rng(step)

    def of(leaf):
        left = rng.normal(size=(*leaf.shape[:-1], rank))
        right = rng.normal(size=(*leaf.shape[:-2], rank, leaf.shape[-1]))
        return jnp.asarray(left @ right, jnp.float32)

    return jax.tree.map(of, PARAMS)


def tuned(state: Any, compaction: Compaction, ranks: list[int], start=0) -> Any:
    """Returns the state behind an update and a look for each rank, and the columns."""
    update, seen = jax.jit(optimizer().update), []
    for step, rank in enumerate(ranks, start):
        _, state = update(gradients(step, rank), state, PARAMS)
        state = compaction.look(state, has_budget=False, most=RANK)
        seen.append(columns(state))
    return state, seen


@pytest.mark.slow
def test_a_resumed_run_cuts_and_grows_as_the_whole_one(tmp_path):
    """The checkpoint falls between two looks, behind a cut and before a growth."""
    ranks = [3] * LOOKS + [8] * LOOKS + [8]
    whole, expected = tuned(fresh(), Compaction(), ranks)
    assert [seen[0] for seen in expected] == [8, 8, 8, 4, 4, 4, 4, 5, 5]
    # The new column is in use behind the next refresh.
    assert all(np.all(rank == 5) for rank in lowrank_optax.ranks(whole).values())

    half = LOOKS + 2
    compaction = Compaction()
    state, first = tuned(fresh(), compaction, ranks[:half])
    saved = json.loads(json.dumps(dataclasses.asdict(compaction)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(optimizer().init, PARAMS)
        metadata = checkpointer.metadata(tmp_path / "state").item_metadata.tree
        state = checkpointer.restore(
            tmp_path / "state", lowrank_optax.like_saved(shapes, metadata)
        )
    halves, second = tuned(state, Compaction(**saved), ranks[half:], half)
    assert first + second == expected
    jax.tree.map(np.testing.assert_array_equal, halves, whole)


@pytest.mark.parametrize("basis", ["range_finder", "dct"])
def test_columns_come_back_with_the_demand(basis):
    """Column numbers do not show the side: they must not keep a leaf small."""
    rule = {
        "range_finder": lowrank_optax.range_finder,
        "dct": lowrank_optax.dct_columns,
    }
    tx = lowrank_optax.adarankgrad(
        0.1,
        lowrank_optax.energy_rank(RANK, 1e-2, min_rank=1, smoothing=0.0),
        basis=rule[basis](),
        refresh=lowrank_optax.every(1, stagger=False),
    )
    params = {"w": jnp.zeros((40, 24))}
    columns = lowrank_optax.dct_columns().columns(
        jnp.arange(RANK)[None], 24, jnp.float32
    )
    rng, state, update = np.random.default_rng(0), tx.init(params), jax.jit(tx.update)
    compaction, found = Compaction(), []
    for step in range(8 * LOOKS):
        count = 2 if step < LOOKS else RANK
        left = jnp.asarray(rng.normal(size=(40, count)), jnp.float32)
        _, state = update({"w": left @ columns[:, :count].T}, state, params)
        state = compaction.look(state, False, RANK)
        found.append(lowrank_optax.capacities(state)["['w']"])
    assert min(found) < RANK
    assert found[-1] == RANK
