"""The command from end to end: what it writes, what it refuses, how it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from experiments.model.hugging_face import load_llama
from experiments.pretrain_llama import main
from experiments.run.quantities import LINE, SUMMARY
from experiments.run.summary import cost_rows
from tests.experiments.small_runs import (
    MODEL,
    TIMES,
    assert_same_run,
    one_error_line,
    read_lines,
    read_state,
    run,
    write_inputs,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run of adamw with checkpoints at 2 and 4, and its flags."""
    out = tmp_path_factory.mktemp("finished") / "out"
    flags = [*inputs, "--optimizer", "adamw", "--checkpoint-every", 2, "--out", out]
    assert run(*flags) == 0
    return out, flags


def copy_of(finished, tmp_path):
    out, flags = finished
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "out", [*flags[:-1], tmp_path / "out"]


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.usefixtures("one_device")
def test_a_run_writes_all_its_results_and_ends_with_a_table_and_a_sample(
    inputs, tmp_path, capsys
):
    out = tmp_path / "out"
    flags = ["--optimizer", "adarankgrad", "--rank", 4, "--save-weights"]
    assert run(*inputs, *flags, "--out", out) == 0

    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["tokens"] == 4 * 8 * 8
    assert summary["validation_loss"] < summary["initial_validation_loss"]
    assert summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]
    state = read_state(out, 4)
    params = {path: leaf for path, leaf in state.items() if "params" in path}
    assert summary["parameter_count"] == sum(leaf.size for leaf in params.values())
    assert summary["optimizer_state_bytes"] == sum(
        leaf.nbytes for path, leaf in state.items() if path not in params
    )

    lines = read_lines(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    validated = [line["step"] for line in lines if "validation_loss" in line]
    assert validated == [0, 3, 4]
    assert lines[0]["validation_loss"] == summary["initial_validation_loss"]
    assert lines[-1]["validation_loss"] == summary["validation_loss"]
    assert lines[2]["tokens"] == 2 * 8 * 8
    assert lines[1]["ranks"]["blocks/mlp/up"] != []
    assert summary["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert summary["bytes_per_device"] == {
        "parameters": summary["memory"]["parameters"],
        "gradients": summary["memory"]["gradients"],
        "optimizer_state": summary["optimizer_state_bytes"],
        "optimizer_state_in_host_memory": 0,
    }
    assert "on each device" not in cost_rows(summary)
    cut = cost_rows({**summary, "mesh": {"data": 2, "fsdp": 4, "tensor": 1}})
    assert "(mesh: data 2, fsdp 4, tensor 1)" in cut["on each device"]
    assert json.loads((out / "config.json").read_text())["rank"] == 4
    assert set().union(*lines) | TIMES == {quantity.name for quantity in LINE}
    assert summary.keys() == {quantity.name for quantity in SUMMARY}
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {"loss.png", "memory.png"}  # All ranks are 4.
    assert list((out / "tensorboard").iterdir())

    model, weights = load_llama(out / "weights")
    assert model == MODEL
    for path, leaf in jax.tree.leaves_with_path(weights):
        saved = params["['params']" + jax.tree_util.keystr(path)]
        np.testing.assert_array_equal(leaf, saved)

    said = capsys.readouterr().out
    assert said.index("validation loss") < said.rindex("optimizer state")
    assert said.rindex("optimizer state") < said.rindex("a sample")
    prompt, _, continuation = said.split("is the prompt:\n")[1].partition("|")
    text = Path(inputs[inputs.index("--data") + 1]).read_text()
    assert prompt == text[-461:][:2]  # A quarter of 8 tokens; the last 5 % and an end.
    assert len(continuation) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1"),
        (["--optimizer", "sgd"], "--optimizer 'sgd' is not known"),
        (["--stepz", "3"], "did you mean --steps?"),
        (["--batch-size", "3"], "--batch-size 3 is not a multiple of the 8 devices"),
        (["--data", "nowhere/*.txt"], "nowhere"),
        (["--initial-weights", "nowhere"], "nowhere"),
        (["--tokenizer", "nowhere.model"], "nowhere.model"),
        (["--accumulate", "3"], "--accumulate 3 does not divide --batch-size 8"),
        (["--accumulate", "2"], "8 devices, times --accumulate 2"),
        (["--block-state-bytes", "1kB"], "--block-state-bytes 1kB: a budget of 1,000"),
        (
            ["--optimizer", "projfactor", "--rank", "4", "--granularity", "4"],
            "--rank 4 at granularity 4 leaves every block matrix at full size",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_makes_nothing(
    flags, message, inputs, tmp_path, capsys
):
    assert run(*inputs, "--out", tmp_path / "out", *flags) == 2
    assert message in one_error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_device")
def test_weights_bring_their_tokenizer_and_one_that_is_not_theirs_is_remarked(
    inputs, tmp_path, capsys
):
    words = ["</s>", "<s>", "low", "rank", "of", "a", "gradient"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(dict(zip(words, range(7), strict=True)), "of")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Scaled up, they are sure of what they have not learned.
    flags = write_inputs(tmp_path, scale=30.0)
    model.save(str(tmp_path / "model/tokenizer.json"))
    flags += ["--optimizer", "adamw", "--save-weights"]
    assert run(*flags, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    beside = str(tmp_path / "model/tokenizer.json")
    assert f"tokenizer: {beside}, beside the weights" in said
    assert "2,001 tokens in 1 documents" in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tokenizer"] == beside
    assert said.count("warning: the weights in") == 1
    assert f"--tokenizer {beside} is not the one they were trained with" in said

    saved = tmp_path / "out/weights"
    assert (saved / "tokenizer.json").read_text() == Path(beside).read_text()
    raw = json.loads((saved / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, 0)
    assert raw["max_position_embeddings"] == 2048


def test_an_empty_text_is_refused(inputs, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    flags = ["--data", tmp_path / "empty.txt", "--out", tmp_path / "out"]
    assert run(*inputs, *flags) == 2
    assert "empty.txt" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_directory_is_not_touched(finished, capsys):
    out, flags = finished
    before = contents(out)
    assert run(*flags) == 2
    assert "holds another run" in one_error_line(capsys)
    assert contents(out) == before


def test_resuming_with_another_configuration_names_each_difference(finished, capsys):
    out, flags = finished
    before = contents(out)
    changed = ["--resume", "--seed", 1, "--learning-rate", 0.5, "--log-every", 2]
    assert run(*flags, *changed) == 2
    error = one_error_line(capsys)
    assert "another configuration: --seed was 0, is 1; its checkpoint" in error
    assert contents(out) == before


def test_resuming_with_other_text_is_refused(finished, tmp_path, capsys):
    _, flags = copy_of(finished, tmp_path)
    data = Path(flags[flags.index("--data") + 1])
    text = data.read_text()
    try:
        data.write_text(text.replace("rank", "tank"))
        assert run(*flags, "--resume") == 2
    finally:
        data.write_text(text)
    assert "has other text than" in one_error_line(capsys)


def test_a_damaged_checkpoint_is_named_and_deleting_it_lets_the_run_go_on(
    finished, tmp_path, capsys
):
    out, flags = copy_of(finished, tmp_path)
    (out / "checkpoints/4/state/_METADATA").unlink()
    assert run(*flags, "--resume") == 2
    error = one_error_line(capsys)
    assert "checkpoints/4 is damaged: state/_METADATA is missing" in error
    assert "checkpoints/2, which is whole" in error

    shutil.rmtree(out / "checkpoints/4")
    assert run(*flags, "--resume") == 0
    assert_same_run(finished[0], out, 4)


def test_resuming_a_finished_run_reports_it_again(finished, tmp_path):
    out, flags = copy_of(finished, tmp_path)
    (out / "summary.json").unlink()
    assert run(*flags, "--resume", "--log-every", 2) == 0
    ours, theirs = (
        json.loads((d / "summary.json").read_text()) for d in (out, finished[0])
    )
    for name in ("compile_seconds", "peak_memory_bytes"):
        del ours[name], theirs[name]
    assert ours == theirs


def start(flags):
    """Starts the command in a process of its own, compiled as in this one."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain_llama", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_run(inputs, tmp_path_factory):
    """Flags of a run long enough to be hit, and one that was not."""
    flags = [*inputs, "--optimizer", "adamw", "--steps", 300, "--log-every", 20]
    flags += ["--eval-every", 300, "--checkpoint-every", 40]
    out = tmp_path_factory.mktemp("long") / "out"
    assert run(*flags, "--out", out) == 0
    return flags, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_hit_by_a_signal_is_resumed_bit_for_bit(number, long_run, tmp_path):
    flags, undisturbed = long_run
    flags = [*flags, "--out", tmp_path / "out"]
    process = start(flags)
    wait_for(tmp_path / "out/checkpoints/40", process)
    process.send_signal(number)
    said, complained = process.communicate(timeout=60)

    assert not (tmp_path / "out/checkpoints/300").exists()
    if number == signal.SIGTERM:
        assert (process.returncode, complained) == (0, "")
        assert "stopped by SIGTERM and saved at step" in said
    else:
        assert process.returncode == -signal.SIGKILL
    assert run(*flags, "--resume") == 0
    assert_same_run(undisturbed, tmp_path / "out", 300)


def test_the_file_runs_as_a_script_from_anywhere(tmp_path):
    # Its own folder comes first then, and is not the one that `experiments` is in.
    words = tokenizers.models.WordLevel({"</s>": 0, "low": 1}, unk_token="</s>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "words.json"))
    flags = ["--tokenizer", "words.json", "--data", "nowhere.txt"]
    done = subprocess.run(
        [sys.executable, ROOT / "experiments/pretrain_llama.py", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere.txt" in done.stderr


def test_help_exits_with_status_0(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--optimizer" in capsys.readouterr().out
