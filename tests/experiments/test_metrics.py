"""metrics.jsonl, and the directory of a run."""

import json

import pytest

from experiments.errors import UserError
from experiments.run.files import check_is_free, make_directory, write_json
from experiments.run.metrics import MetricsLog, read_metrics


def write_lines(directory, steps, after=0):
    with MetricsLog(directory, after) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step, "ranks": {"w": [2, 4], "v": 3}})


def test_lines_behind_the_resumed_step_and_a_half_line_are_cut(tmp_path):
    write_lines(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    write_lines(tmp_path, [3, 6], after=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 6]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_that_starts_has_its_own_lines_alone(tmp_path):
    # Of one that was stopped before its first step.
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "validation_loss": 5.0})
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "validation_loss": 5.0})
    assert len(read_metrics(tmp_path)) == 1


def test_a_line_is_in_the_file_before_the_log_is_closed(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": 2.5})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]


def test_tensorboard_has_the_numbers_in_groups(tmp_path):
    write_lines(tmp_path, [1, 2, 3])
    (events,) = (tmp_path / "tensorboard").iterdir()
    for name in (b"train/loss", b"rank/w", b"rank/v"):
        assert events.read_bytes().count(name) == 3, name


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    write_json(
        tmp_path / "a.json", {"x": [float("nan"), 1.0], "y": {"z": float("inf")}}
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [None, 1.0], "y": {"z": None}}
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": float("nan")})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["checkpoints/4", "metrics.jsonl", "summary.json"])
def test_a_directory_with_another_run_is_refused(name, tmp_path):
    check_is_free(tmp_path / "new")
    check_is_free(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds another run; .*--resume"):
        check_is_free(tmp_path)


def test_what_a_run_left_that_had_nothing_yet_is_in_nobodys_way(tmp_path):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    check_is_free(tmp_path)


def test_resuming_overwrites_no_finished_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    check_is_free(tmp_path, resume=True)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="a finished run without checkpoints"):
        check_is_free(tmp_path, resume=True)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a directory"):
        check_is_free(tmp_path / "file")
    with pytest.raises(UserError, match="cannot make --out"):
        make_directory(tmp_path / "file/below")
