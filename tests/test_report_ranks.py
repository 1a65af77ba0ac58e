"""Ranks and subspaces by path, out of any optimizer's state."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax

PARAMS = {
    "blocks": {"w": jnp.ones((3, 16, 8))},
    "head": jnp.ones((8, 20)),
    "norm": jnp.ones(8),
}


def _low_rank(rank):
    return lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), rank=rank)


def _partitioned():
    labels = {"blocks": {"w": "low"}, "head": "lower", "norm": "full"}
    parts = {"low": _low_rank(4), "lower": _low_rank(2), "full": optax.adam(1e-3)}
    return optax.partition(parts, labels)


def _masked():
    mask = {"blocks": {"w": True}, "head": False, "norm": True}
    return optax.masked(_low_rank(4), mask)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (_low_rank(4), {"['blocks']['w']": [4, 4, 4], "['head']": 4}),
        (lowrank_optax.galore(1e-3, 3), {"['blocks']['w']": [3] * 3, "['head']": 3}),
        (_partitioned(), {"['blocks']['w']": [4, 4, 4], "['head']": 2}),
        (_masked(), {"['blocks']['w']": [4, 4, 4]}),
        (
            optax.apply_if_finite(optax.chain(optax.clip(1.0), _low_rank(4)), 2),
            {"['blocks']['w']": [4, 4, 4], "['head']": 4},
        ),
        (optax.adam(1e-3), {}),
    ],
)
def test_ranks_are_found_by_path_in_any_optimizers_state(optimizer, expected):
    found = lowrank_optax.ranks(optimizer.init(PARAMS))
    assert {path: rank.tolist() for path, rank in found.items()} == expected
    assert all(rank.dtype == np.int32 for rank in found.values())


def test_a_single_matrix_is_called_as_in_projections():
    optimizer, head = _low_rank(4), PARAMS["head"]
    assert lowrank_optax.ranks(optimizer.init(head)) == {"(the whole tree)": 4}
    assert list(lowrank_optax.projections(optimizer, head)) == ["(the whole tree)"]


def test_subspaces_are_those_of_the_state():
    state = _partitioned().init(PARAMS)
    found = lowrank_optax.subspaces(state)
    assert sorted(found) == ["['blocks']['w']", "['head']"]
    assert found["['blocks']['w']"].basis.shape == (3, 8, 4)
    assert found["['head']"].basis.shape == (8, 2)
