"""What a step over a mesh sends: shares of parameters and bases, no whole gradient."""

import collections

import pytest

import lowrank_optax
from benchmarks import hlo
from benchmarks.sharded_llama import (
    SEQUENCES,
    compiled_step,
    model_of,
    sharded_params,
)
from experiments.distribution.mesh import make_mesh
from experiments.distribution.rules import placed_shapes

RANK = 32
MODEL = model_of(2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh("data=2,fsdp=4", SEQUENCES)


@pytest.fixture(scope="module")
def tx():
    return lowrank_optax.by_role(lowrank_optax.galore(1e-3, RANK), 1e-3)


@pytest.fixture(scope="module", params=["full", "subspace"])
def sent(request, mesh, tx):
    """The kind of gradients, and the collectives without a renewal."""
    text = compiled_step(MODEL, tx, mesh, request.param == "subspace")
    found, renewal = hlo.collectives(text, mesh.size)
    assert not renewal
    return request.param, found


def test_bases_are_gathered_for_gradients_and_for_the_update(sent, mesh, tx):
    gradients, found = sent
    _, state = placed_shapes(tx, sharded_params(MODEL, mesh))
    columns = [x.basis for x in lowrank_optax.subspaces(state).values()]
    assert all("fsdp" in x.sharding.spec for x in columns)
    numbers = sum(x.size for x in columns)
    gathered = collections.Counter()
    for one in found:
        if one.kind == "all-gather" and one.line.split("]")[0].endswith(f",{RANK}"):
            gathered[one.trips] += one.numbers * one.trips
    # Once for all layers; in subspaces once more, layer by layer.
    expected = {1: numbers} | ({2: numbers} if gradients == "subspace" else {})
    assert gathered == expected


def test_no_gradient_is_gathered_and_none_is_added_up_whole(sent, mesh):
    _, found = sent
    head = MODEL.hidden_size * MODEL.vocab_size
    of_layer = MODEL.hidden_size * MODEL.intermediate_size
    gathered = [x for x in found if x.kind == "all-gather"]
    # In the loop over layers its matrices, forward and backward, and bases; else bases,
    # the head, and words of the batch.
    large = {(x.trips, x.numbers) for x in gathered if x.numbers >= head}
    assert large == {(1, head), (2, of_layer)}
    # Of the table too, over data, each device adds up its share alone.
    over_all = [x for x in found if x.kind == "all-reduce" and x.group == mesh.size]
    assert max(x.numbers for x in over_all) <= 2 * MODEL.hidden_size
