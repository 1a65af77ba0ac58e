"""The rules that say how parameters and optimizer state lie on a mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from experiments.distribution.mesh import make_mesh, planned_mesh
from experiments.distribution.placement import initial_state, place_like
from experiments.distribution.rules import (
    LEAST_BYTES,
    bytes_per_device,
    memory_plan,
    on_mesh,
    parameter_shardings,
    placed_shapes,
)
from experiments.errors import UserError
from experiments.model.adapters import with_adapters
from experiments.model.encoder import init_encoder
from experiments.model.llama import init_params
from experiments.model.logical_axes import logical_axes
from experiments.model.shape import preset
from experiments.run.config import parse
from experiments.run.plans import every_optimizer, plan_of, shapes_of
from tests.experiments.small_runs import MODEL
from tests.experiments.small_tuning import MODEL as ENCODER

TINY = preset("tiny", 257)
METHODS = ("adamw", "adarankgrad", "sumo", "low_rank_muon", "projfactor")


def shapes():
    return jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))


def specs(params, mesh, report=None):
    found = parameter_shardings(params, mesh, report)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree.leaves_with_path(found)
    }


def test_kernels_are_cut_by_their_logical_axes_and_an_odd_vocabulary_is_not():
    said = []
    found = specs(shapes(), make_mesh("fsdp=2,tensor=2", 8), said.append)
    assert found == {
        "embedding": PartitionSpec(None, "fsdp"),
        "head": PartitionSpec("fsdp"),
        "norm": PartitionSpec(),
        "blocks/attention_norm": PartitionSpec(),
        "blocks/mlp_norm": PartitionSpec(),
        # Keys and values are 16 x 8, queries and outputs 16 x 16.
        "blocks/attention/query": PartitionSpec(None, "fsdp", "tensor"),
        "blocks/attention/key": PartitionSpec(None, "fsdp", "tensor"),
        "blocks/attention/value": PartitionSpec(None, "fsdp", "tensor"),
        "blocks/attention/output": PartitionSpec(None, ("tensor", "fsdp")),
        # The inner size is the longer one.
        "blocks/mlp/gate": PartitionSpec(None, None, ("tensor", "fsdp")),
        "blocks/mlp/up": PartitionSpec(None, None, ("tensor", "fsdp")),
        "blocks/mlp/down": PartitionSpec(None, ("tensor", "fsdp")),
    }
    assert [line.split(",")[0] for line in said] == ["--mesh tensor=2: vocab"] * 2
    assert "257 of embedding (257, 16), is not cut, but whole" in said[0]


def mesh_of(fsdp, tensor=1):
    return AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "mesh", "expected"),
    [
        # The first among equals, as the projection keeps the rows of a square.
        ("output", (2, 16, 16), mesh_of(4), (None, "fsdp")),
        # The longest that fsdp divides, in pieces of tensor too.
        ("gate", (2, 16, 18), mesh_of(4), (None, "fsdp")),
        ("gate", (2, 16, 18), mesh_of(2, 2), (None, "fsdp", "tensor")),
        ("down", (2, 24, 16), mesh_of(8, 2), (None, "tensor", "fsdp")),
        # Never the vocabulary, nor a stack of layers.
        ("head", (8, 64), mesh_of(4), ("fsdp",)),
        ("key", (64, 8, 4), mesh_of(4), (None, "fsdp")),
        ("norm", (64, 8), mesh_of(4), ()),
    ],
)
def test_fsdp_cuts_the_longest_side_that_it_divides(path, shape, mesh, expected):
    params = {"blocks": {path: jax.ShapeDtypeStruct(shape, "float32")}}
    assert specs(params, mesh) == {f"blocks/{path}": PartitionSpec(*expected)}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (
            mesh_of(3),
            "--mesh fsdp=3 does not divide embed, 16 or heads, 8 of "
            r"blocks/attention/key \(2, 16, 8\); choose a divisor of 16 or 8$",
        ),
        # tensor has cut the heads: fsdp would divide the pieces.
        (mesh_of(3, 2), "choose a divisor of 16 or 4$"),
        (mesh_of(1, 3), r"--mesh tensor=3 does not divide heads, 8 of blocks/"),
    ],
)
def test_a_mesh_that_divides_no_side_names_the_leaf(mesh, words):
    with pytest.raises(UserError, match=words):
        specs(shapes(), mesh)


def test_adapters_and_encoders_have_the_axes_of_their_matrices():
    params = jax.eval_shape(
        lambda: with_adapters(
            init_params(MODEL, jax.random.key(0)), "lora", 2, jax.random.key(0)
        )
    )
    found = logical_axes(params)["adapters"]
    assert found["blocks.mlp.down"] == {
        "down": (None, "mlp", None),
        "up": (None, None, "embed"),
    }
    encoder = jax.eval_shape(lambda: init_encoder(ENCODER, jax.random.key(0)))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): axes
        for path, axes in jax.tree.leaves_with_path(
            logical_axes(encoder), is_leaf=lambda x: isinstance(x, tuple)
        )
    }
    assert names["blocks/attention/output/kernel"] == (None, "heads", "embed")
    assert names["embeddings/word"] == ("vocab", "embed")
    assert {name for name, axes in names.items() if any(axes)} == {
        *("embeddings/word", "embeddings/position", "embeddings/segment"),
        *(f"blocks/attention/{x}/kernel" for x in ("query", "key", "value", "output")),
        *("blocks/mlp/up/kernel", "blocks/mlp/down/kernel", "pooler/kernel"),
    }


def placed(config, mesh):
    """Returns the optimizer, and parameters and state of tiny with shardings."""
    _, tx, params = shapes_of(config, TINY)
    params = on_mesh(params, parameter_shardings(params, mesh))
    return tx, *placed_shapes(tx, params)


def whole(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("fsdp", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_device_has_its_share_of_parameters_and_of_state(method, fsdp):
    text = f"fsdp={fsdp}"
    config = parse(["--optimizer", method, "--mesh", text])
    _, *trees = placed(config, planned_mesh(text))
    # Norms, their moments and scalars are whole on every device. They have less than a
    # hundredth of the bytes.
    slack = 0.01 * (fsdp - 1)
    for tree in trees:
        assert bytes_per_device(tree) <= whole(tree) / fsdp * (1 + slack)
    found = plan_of(config, 257).per_device
    kept = [found.parameters, found.optimizer]
    assert kept == [bytes_per_device(tree) for tree in trees]


@pytest.mark.parametrize("name", every_optimizer(parse([])))
def test_no_large_array_of_any_optimizer_is_whole(name):
    config = every_optimizer(parse([]))[name]
    _, _, state = placed(config, planned_mesh("fsdp=2,tensor=2"))
    for path, leaf in jax.tree.leaves_with_path(state):
        is_cut = "fsdp" in str(leaf.sharding.spec)
        size = leaf.size * leaf.dtype.itemsize
        assert is_cut or size < LEAST_BYTES, jax.tree_util.keystr(path)


def test_a_moment_of_a_whole_parameter_is_whole_however_large():
    shapes = {"norm": (4, LEAST_BYTES), "gate": (4, 64, 128)}
    params = {
        "blocks": {k: jax.ShapeDtypeStruct(x, "float32") for k, x in shapes.items()}
    }
    params = on_mesh(params, parameter_shardings(params, mesh_of(4)))
    _, (state, *_) = placed_shapes(optax.adam(1e-3), params)
    specs = {k: tuple(x.sharding.spec) for k, x in state.mu["blocks"].items()}
    assert specs == {"norm": (None, None), "gate": (None, None, "fsdp")}


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_what_a_device_holds_to_the_byte(method):
    tx, *trees = placed(parse(["--optimizer", method]), make_mesh("fsdp=4,tensor=2", 8))
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in trees]
    params = jax.device_put(init_params(TINY, jax.random.key(0)), shardings[0])
    held = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for tree in (params, initial_state(tx, params, shardings[1]))
    ]
    plan = memory_plan(tx, params).per_device
    assert [plan.parameters, plan.optimizer] == held


def test_an_axis_of_a_new_length_that_its_cut_does_not_divide_is_whole():
    mesh = make_mesh("fsdp=4", 8)
    columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    old = {name: jnp.zeros((5, 8), device=columns) for name in "ab"}
    new = {"a": jnp.zeros((5, 6)), "b": jnp.zeros((5, 4)), "c": jnp.zeros(3)}
    found = {k: tuple(x.sharding.spec) for k, x in place_like(new, old, mesh).items()}
    assert found == {"a": (), "b": (None, "fsdp"), "c": ()}
