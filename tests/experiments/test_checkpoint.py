"""Checkpoints: what survives, what is refused."""

import asyncio
import gc
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.errors import UserError
from experiments.run import checkpoint
from experiments.run.checkpoint import (
    Checkpoints,
    RunRecord,
    read_record,
    restore_state,
)
from experiments.run.files import CHECKPOINTS

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
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(2, params, state, RECORD)
    assert read_record(tmp_path) == RECORD
    shapes = jax.eval_shape(lambda: (params, state))
    restored = restore_state(tmp_path, 2, *shapes)
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
    with Checkpoints(tmp_path / CHECKPOINTS, keep=3) as checkpoints:
        for step in range(3):
            checkpoints.save(step, params, (), RECORD)
            for _ in range(5):
                params = add_one(params)
    for step in (2, 1, 0):
        restored, _ = restore_state(tmp_path, step, params, ())
        np.testing.assert_array_equal(restored["w"], 5.0 * step)


def test_only_the_newest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path / CHECKPOINTS, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, *make_state(step), RECORD)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"2", "3"}


def test_a_save_that_was_killed_is_swept_away_and_the_one_before_taken(tmp_path):
    with Checkpoints(tmp_path / CHECKPOINTS, keep=2) as checkpoints:
        checkpoints.save(1, *make_state(1), RECORD)
    # What Orbax calls a checkpoint while it writes it.
    unfinished = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/1", unfinished)
    assert read_record(tmp_path) == RECORD
    with Checkpoints(tmp_path / CHECKPOINTS, keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
    assert not unfinished.exists()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def data_file(checkpoint):
    return max(
        (checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size
    )


DAMAGES = {
    "a flipped bit of an array": lambda c: flip_a_bit(data_file(c)),
    "a flipped bit of the record": lambda c: flip_a_bit(c / "run/metadata"),
    "a cut array": lambda c: data_file(c).write_bytes(b""),
    "no arrays": lambda c: shutil.rmtree(c / "state"),
    "no metadata": lambda c: (c / "state/_METADATA").unlink(),
    "no record": lambda c: shutil.rmtree(c / "run"),
    "no checksums": lambda c: (c / "checksums.json").unlink(),
    "cut checksums": lambda c: (c / "checksums.json").write_text("{"),
    "empty": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a run with checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory / CHECKPOINTS, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *make_state(step), RECORD)
    return directory


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_so_is_one_that_is_whole(
    damage, saved, tmp_path
):
    shutil.copytree(saved, tmp_path / "run")
    DAMAGES[damage](tmp_path / "run/checkpoints/3")
    named = r"checkpoints/3 is damaged: \S+ (is missing|cannot be read|does not have)"
    with pytest.raises(UserError, match=rf"{named}.*newer than \S+/2, which is whole"):
        read_record(tmp_path / "run")
    DAMAGES[damage](tmp_path / "run/checkpoints/2")
    with pytest.raises(UserError, match=r"newer than \S+/1, which is whole"):
        read_record(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/1")
    with pytest.raises(UserError, match="no older one is whole"):
        read_record(tmp_path / "run")


def test_without_the_damaged_checkpoints_the_whole_one_is_restored(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step}")
    assert read_record(tmp_path / "run") == RECORD
    params, _ = restore_state(tmp_path / "run", 1, *make_state(0))
    np.testing.assert_array_equal(params["b"], 1)


def test_checksums_are_there_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    def no_checksums(directory):
        raise OSError("no room")

    monkeypatch.setattr(checkpoint, "write_checksums", no_checksums)
    with (
        pytest.raises(UserError, match=r"cannot write a checkpoint.*no room"),
        Checkpoints(tmp_path / CHECKPOINTS, keep=2) as checkpoints,
    ):
        checkpoints.save(1, *make_state(1), RECORD)
    # Nor is what a failed save has written in the way of the next one.
    assert list((tmp_path / CHECKPOINTS).iterdir()) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), r"\(No space left on device\)"),
        (
            # As tensorstore has it.
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "x/0": Failed writing: '
                '"x/0.__lock": Failed to write 9 bytes to file 4: No space left on '
                "device [os_error_code='28']"
            ),
            r"\(No space left on device\)",
        ),
        (ValueError("UNKNOWN: something\nelse"), r"\(UNKNOWN: something\)"),
    ],
)
def test_what_the_system_says_of_a_failed_save_is_told(
    error, told, tmp_path, monkeypatch
):
    def fail(directory):
        raise error

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with (
        pytest.raises(UserError, match=told),
        Checkpoints(tmp_path / CHECKPOINTS, keep=2) as checkpoints,
    ):
        checkpoints.save(1, *make_state(1), RECORD)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.best_step = 2 if step >= 2 else None
            checkpoints.save(step, *make_state(step), RECORD)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"2", "4"}


def test_a_state_of_another_shape_is_refused(tmp_path):
    params, state = make_state(1)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(1, params, state, RECORD)
    other = {**params, "b": jnp.zeros((5, 1))}
    with pytest.raises(UserError, match=r"checkpoints/1.*\['b'\].*another optimizer"):
        restore_state(tmp_path, 1, other, state)


def test_where_there_is_no_checkpoint_there_is_no_record_and_nothing_is_made(tmp_path):
    assert read_record(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_writes_that_fail_behind_the_first_say_nothing(tmp_path, caplog):
    loop = asyncio.new_event_loop()
    with Checkpoints(tmp_path / CHECKPOINTS, 1):
        failed = loop.create_future()
        failed.set_exception(ValueError("File too large"))
        del failed
        gc.collect()
        loop.call_exception_handler({"message": "something else"})
    loop.close()
    assert [record.getMessage() for record in caplog.records] == ["something else"]
