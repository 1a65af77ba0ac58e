"""What ``like_saved`` says of what another version, or optimizer, has saved."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import lowrank_optax
from lowrank_optax import Subspace, like_saved
from tests.suite import types

PARAMS = {"w": jnp.zeros((12, 8)), "b": jnp.zeros(8)}
OPTIMIZERS = {
    "galore": lambda: lowrank_optax.galore(0.1, 3),
    "fira": lambda: lowrank_optax.fira(0.1, 3),
    "partition": lambda: optax.partition(
        {"a": lowrank_optax.galore(0.1, 3), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}
    ),
    "low_bit": lambda: lowrank_optax.low_bit(lowrank_optax.galore(0.1, 3), min_size=1),
}


def before_0_2(state):
    """Returns a state in the layout of before: subspaces without the later fields."""

    def old(node):
        if not isinstance(node, Subspace):
            return node
        fields = node._asdict()
        return {k: fields[k] for k in fields if k not in ("failures", "residual")}

    return jax.tree.map(old, state, is_leaf=lambda x: isinstance(x, Subspace))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_the_layout_before_is_refused_as_such(name):
    state = jax.eval_shape(OPTIMIZERS[name]().init, PARAMS)
    with pytest.raises(ValueError, match=r"written by lowrank_optax before 0\.2"):
        like_saved(state, before_0_2(state))


def test_so_is_its_checkpoint(tmp_path):
    optimizer = OPTIMIZERS["galore"]()
    state = optimizer.init(PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", before_0_2(state))
        checkpointer.wait_until_finished()
        saved = checkpointer.metadata(tmp_path / "state").item_metadata.tree
    with pytest.raises(ValueError, match="finish the run with the version that began"):
        like_saved(jax.eval_shape(optimizer.init, PARAMS), saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_this_layout_is_not(name):
    state = jax.eval_shape(OPTIMIZERS[name]().init, PARAMS)
    assert types(like_saved(state, state)) == types(state)


@pytest.mark.parametrize("name", ["fira", "low_bit"])
def test_another_optimizers_is_refused_by_the_array_that_is_missing(name):
    wanted = jax.eval_shape(OPTIMIZERS[name]().init, PARAMS)
    saved = jax.eval_shape(OPTIMIZERS["galore"]().init, PARAMS)
    missing = {"fira": r"\['w'\]\.residual", "low_bit": "codes"}[name]
    with pytest.raises(ValueError, match=rf"{missing}.* not there in the saved state"):
        like_saved(wanted, saved)


def test_optimizers_without_a_subspace_have_no_layout_of_this_library():
    state = jax.eval_shape(optax.adamw(0.1).init, PARAMS)
    assert types(like_saved(state, state)) == types(state)
