"""Client by client and method by method: lists right, trains, resumes, shards."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import lowrank_optax
from lowrank_optax.binding.states import names
from lowrank_optax.matrix.boxes import unboxed
from tests.clients.clients import CLIENTS, QUICK, TELLING, client, is_installed
from tests.clients.protocol import (
    METHODS,
    RATE,
    STEPS,
    VOCABULARY,
    Matrices,
    Trainer,
    name_of,
)

pytestmark = [
    pytest.mark.usefixtures("fast_compilation"),
    # The clients call what jax has deprecated; this library must not.
    pytest.mark.filterwarnings("error:::lowrank_optax", "default"),
]


def _marks(name: str, method: str = "galore") -> list:
    """Returns the marks of a client with a method.

    Only what is not installed is skipped: a client that cannot be imported fails.
    """
    reason = f"{name} is not installed here; make clients has it"
    missing = pytest.mark.skipif(not is_installed(name), reason=reason)
    if name in QUICK and method == "galore":
        return [missing]
    is_telling = method in TELLING.get(name, METHODS)
    return [missing, pytest.mark.slow if is_telling else pytest.mark.clients]


def _cells() -> list:
    """Returns each client with each method; what takes long has its mark."""

    return [
        pytest.param((name, method), id=f"{name}-{method}", marks=_marks(name, method))
        for name in CLIENTS
        for method in METHODS
    ]


class Run:
    """A client with a method: what the tests ask about, each of it done once."""

    def __init__(self, name: str, method: str, directory: Path):
        self.name, self.client, self.directory = name, client(name), directory
        self.optimizer = METHODS[method]()

    @functools.cached_property
    def trainer(self) -> Trainer:
        return self.client.trainer(self.optimizer)

    @functools.cached_property
    def losses(self) -> list[float]:
        return [self.trainer.step(i) for i in range(STEPS)]

    @functools.cached_property
    def saved(self) -> list[np.ndarray]:
        """Parameters and state as they were when they were written."""
        assert self.losses
        self.trainer.save(self.directory)
        return arrays(self.trainer)

    @functools.cached_property
    def restored(self) -> Trainer:
        assert self.saved
        other = self.client.trainer(self.optimizer, seed=1)
        other.restore(self.directory)
        return other


@pytest.fixture(scope="module", params=_cells())
def run(request, tmp_path_factory) -> Run:
    return Run(*request.param, tmp_path_factory.mktemp("saved"))


@functools.cache
def _fall_with_adamw(name: str) -> float:
    trainer = client(name).trainer(optax.adamw(RATE))
    losses = [trainer.step(i) for i in range(STEPS)]
    return losses[0] - losses[-1]


def arrays(trainer: Trainer) -> list[np.ndarray]:
    leaves = jax.tree.leaves(unboxed((trainer.params, trainer.opt_state)))
    return [np.asarray(jax.device_get(leaf)) for leaf in leaves]


def test_lists_right(run):
    """Each hidden matrix once, what is none at full size."""
    plans = lowrank_optax.projections(run.optimizer, run.trainer.params).values()
    found = {
        name_of(plan.path): Matrices(
            plan.view.stack, frozenset((plan.view.rows, plan.view.columns))
        )
        if plan.is_projected
        else None
        for plan in plans
    }
    assert found == run.client.expected


@pytest.mark.parametrize("name", [pytest.param(x, marks=_marks(x)) for x in CLIENTS])
def test_roles_are_right(name):
    """The vocabulary is as long as nothing else."""
    optimizer = lowrank_optax.by_role(METHODS["galore"](), RATE)
    params = client(name).trainer(optimizer).params
    plans = lowrank_optax.projections(optimizer, params).values()

    def role(seen):
        if seen is None:
            return "vectors"
        return "vocabulary" if VOCABULARY in seen.sides else "hidden"

    expected = client(name).expected
    assert {name_of(plan.path): plan.role.split()[0] for plan in plans} == {
        path: role(seen) for path, seen in expected.items()
    }


def test_trains(run):
    assert np.all(np.isfinite(run.losses))
    # Rank 3 of 32 and 16 steps: what moves first is a few directions, and the gradient
    # of AdamW has them all.
    assert run.losses[0] - run.losses[-1] > 0.3 * _fall_with_adamw(run.name)


def test_saves(run):
    assert run.saved
    assert any(run.directory.iterdir())


def test_restores(run):
    """What is read is what was written, and goes on as if nothing had happened."""
    for actual, expected in zip(arrays(run.restored), run.saved, strict=True):
        np.testing.assert_array_equal(actual, expected)
    runs = run.trainer, run.restored
    actual, expected = ([x.step(STEPS + i) for i in range(3)] for x in runs)
    assert actual == expected
    for actual, expected in zip(*map(arrays, runs), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 simulated devices")
def test_sharded(run, tmp_path):
    """As state_shardings says, the same update, and so again after it was restored."""
    mesh = jax.make_mesh(
        (2, 2),
        ("fsdp", "tp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )
    sharded = run.client.trainer(run.optimizer, mesh)
    alone = run.client.trainer(run.optimizer)
    _assert_sharded(sharded.params, sharded.opt_state, run.optimizer)
    # Sums over devices in another order.
    np.testing.assert_allclose(sharded.step(0), alone.step(0), rtol=1e-5)

    def compare(path, actual, expected):
        name = "/".join(names(path))
        if any(part in name for part in run.client.without_gradient):
            return
        actual, expected = (np.asarray(jax.device_get(x)) for x in (actual, expected))
        # Of RATE at most; enlarged by Adam's division.
        np.testing.assert_allclose(actual, expected, atol=0.05 * RATE, err_msg=name)

    pairs = (unboxed(sharded.params), unboxed(alone.params))
    jax.tree_util.tree_map_with_path(compare, *pairs)

    sharded.save(tmp_path)
    restored = run.client.trainer(run.optimizer, mesh, seed=1)
    restored.restore(tmp_path)
    _assert_sharded(restored.params, restored.opt_state, run.optimizer)
    for actual, expected in zip(arrays(restored), arrays(sharded), strict=True):
        np.testing.assert_array_equal(actual, expected)


def _assert_sharded(params: Any, state: Any, optimizer: Any) -> None:
    """As state_shardings says; and what belongs to a sharded leaf is sharded."""
    expected = jax.tree.leaves(lowrank_optax.state_shardings(optimizer, params))
    found = jax.tree.leaves_with_path(unboxed(state))
    for (path, array), sharding in zip(found, expected, strict=True):
        same = array.sharding.is_equivalent_to(sharding, array.ndim)
        assert same or array.ndim == 0, (names(path), array.sharding, sharding)

    def belongs(path, owner):
        path, owner = names(path), names(owner)
        starts = range(len(path) - len(owner) + 1)
        return any(path[i : i + len(owner)] == owner for i in starts)

    leaves = jax.tree.leaves_with_path(unboxed(params))
    cut = [path for path, x in leaves if not x.sharding.is_fully_replicated]
    assert cut
    for owner in cut:
        own = [x for path, x in found if belongs(path, owner)]
        assert not all(x.sharding.is_fully_replicated for x in own), names(owner)
