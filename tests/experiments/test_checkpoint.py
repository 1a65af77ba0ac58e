"""Checkpoints: what survives, what is refused."""

import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.errors import UserError
from experiments.run.checkpoint import Checkpoints, RunRecord

RECORD = RunRecord({"rank": 4}, "digest", {"next": 3}, {"step": 2, "seconds": 0.5})


class State(NamedTuple):
    count: jax.Array
    moments: Any
    masked: Any
    nothing: Any


def make_state(value):
    params = {"w": jnp.full((3, 4), value, jnp.bfloat16), "b": jnp.full(4, value)}
    state = State(
        count=jnp.asarray(7, jnp.int32),
        moments=({"w": optax.MaskedNode(), "b": params["b"] / 3}, optax.EmptyState()),
        masked=optax.MaskedNode(),
        nothing=None,
    )
    return params, state


def test_structure_dtypes_bits_and_record_survive(tmp_path):
    params, state = make_state(0.1)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(2, params, state, RECORD)
    with Checkpoints(tmp_path / "c", keep=1, resume=True) as checkpoints:
        restored = checkpoints.restore_state(*jax.eval_shape(lambda: (params, state)))
        assert checkpoints.restore_run() == RECORD
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))
    for before, after in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves(restored), strict=True
    ):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_state_donated_right_after_the_save_is_saved_as_it_was(tmp_path):
    add_one = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
    )
    params = {"w": jnp.zeros((500, 500))}
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        for step in range(3):
            checkpoints.save(step, params, (), RECORD)
            for _ in range(5):
                params = add_one(params)
    for step in (2, 1, 0):
        with Checkpoints(tmp_path / "c", keep=3, resume=True) as checkpoints:
            assert checkpoints.latest_step == step
            restored, _ = checkpoints.restore_state(params, ())
        np.testing.assert_array_equal(restored["w"], 5.0 * step)
        shutil.rmtree(tmp_path / "c" / str(step))


def test_only_the_newest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, *make_state(step), RECORD)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3"}


def test_a_save_that_was_killed_is_swept_away_and_the_one_before_taken(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, *make_state(1), RECORD)
    # What Orbax calls a checkpoint while it writes it.
    unfinished = tmp_path / "c/2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c/1", unfinished)
    with Checkpoints(tmp_path / "c", keep=2, resume=True) as checkpoints:
        assert checkpoints.latest_step == 1
    assert not unfinished.exists()


def cut_arrays(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "cut arrays": cut_arrays,
    "no arrays": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "no metadata": lambda checkpoint: (checkpoint / "state/_METADATA").unlink(),
    "no record": lambda checkpoint: shutil.rmtree(checkpoint / "run"),
    "cut record": lambda checkpoint: (checkpoint / "run/metadata").write_text('{"co'),
    "empty": lambda checkpoint: [shutil.rmtree(checkpoint), checkpoint.mkdir()],
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_used(damage, tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *make_state(step), RECORD)
    DAMAGES[damage](tmp_path / "c/2")

    def restore():
        with Checkpoints(tmp_path / "c", keep=2, resume=True) as checkpoints:
            checkpoints.restore_run()
            return checkpoints.restore_state(*make_state(0))

    with pytest.raises(UserError, match=r"c/2 is incomplete or damaged.*delete it"):
        restore()
    shutil.rmtree(tmp_path / "c/2")
    np.testing.assert_array_equal(restore()[0]["b"], 1)


def test_a_state_of_another_shape_is_refused(tmp_path):
    params, state = make_state(1)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, params, state, RECORD)
    with (
        Checkpoints(tmp_path / "c", keep=1, resume=True) as checkpoints,
        pytest.raises(UserError, match=r"c/1.*\['b'\].*another optimizer"),
    ):
        checkpoints.restore_state({**params, "b": jnp.zeros((5, 1))}, state)


def test_nothing_to_resume_is_an_error_that_makes_no_directory(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint in"):
        Checkpoints(tmp_path / "c", keep=1, resume=True)
    assert not (tmp_path / "c").exists()
