"""The commands on a trained model: export, evaluate and generate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, export, generate
from experiments.__main__ import COMMANDS
from experiments.__main__ import main as overview
from experiments.model.hugging_face import load_llama
from experiments.run import load
from tests.experiments.small_runs import one_error_line, run


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run of LoRA with checkpoints at 2 and 4, the best one noted, and its flags."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = [*inputs, "--optimizer", "lora", "--rank", 2, "--learning-rate", 0.1]
    flags += ["--checkpoint-every", 2, "--keep-best", "--keep-checkpoints", 3]
    flags += ["--save-weights"]
    assert run(*flags, "--out", out) == 0
    return out


def call(command, *words):
    return command.main([str(word) for word in words])


def tensors(directory):
    _, params = load_llama(directory)
    return [np.asarray(params[name]) for name in ("embedding", "norm", "head")]


@pytest.mark.usefixtures("one_device")
def test_the_newest_checkpoint_exports_the_weights_that_the_run_saves(
    trained, tmp_path, capsys
):
    assert call(export, trained, "--out", tmp_path / "newest") == 0
    assert "out, step 4: written to" in capsys.readouterr().out
    for saved in (trained / "weights").iterdir():
        assert (tmp_path / "newest" / saved.name).read_bytes() == saved.read_bytes()
    assert call(export, trained, "--out", tmp_path / "2", "--checkpoint", 2) == 0
    assert any(
        not np.array_equal(*pair)
        for pair in zip(
            tensors(tmp_path / "2"), tensors(trained / "weights"), strict=True
        )
    )


@pytest.mark.usefixtures("one_device")
def test_evaluate_finds_the_loss_of_the_run_and_of_its_weights(
    trained, tmp_path, capsys
):
    summary = json.loads((trained / "summary.json").read_text())
    found = {}
    for name, words in {
        "run": [trained],
        "weights": [trained / "weights", "--sequence-length", 8, "--tokens", 100],
        "best": [trained, "--checkpoint", "best", "--tokens", 100],
    }.items():
        path = tmp_path / f"{name}.json"
        if name == "weights":
            config = json.loads((trained / "config.json").read_text())
            words += ["--data", config["data"]]
        # The run validates on 100 tokens by itself.
        assert call(evaluate, *words, "--json", path) == 0
        found[name] = json.loads(path.read_text())
    said = capsys.readouterr().out
    assert f"loss           {summary['validation_loss']:.4f} nats per token" in said
    assert found["run"]["loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert found["best"]["loss"] == pytest.approx(
        summary["best"]["validation_loss"], rel=1e-6
    )
    assert found["run"]["tokens"] == found["weights"]["tokens"] == 100
    assert found["run"]["perplexity"] == pytest.approx(np.exp(found["run"]["loss"]))
    # One byte a token, but for the end of the document.
    bits = found["run"]["loss"] / np.log(2)
    assert found["run"]["bits_per_byte"] == pytest.approx(bits, rel=0.01)


@pytest.mark.usefixtures("one_device")
def test_generate_continues_the_prompt_by_the_seed(trained, capsys):
    def text(*words):
        assert call(generate, *words, "--prompt", "low ra", "--tokens", 9) == 0
        return capsys.readouterr().out

    first = text(trained, "--temperature", 2, "--seed", 5)
    assert first.startswith("low ra")
    assert first == text(trained, "--temperature", 2, "--seed", 5)
    assert first != text(trained, "--temperature", 2, "--seed", 6)
    # Of a share below the likeliest token's, that token alone is left.
    greedy = text(trained, "--temperature", 0)
    assert greedy == text(trained, "--top-p", 1e-6)
    # In training the end of a document begins the next; elsewhere, the beginning does.
    assert greedy == text(trained / "weights", "--temperature", 0)


@pytest.mark.usefixtures("one_device")
def test_mistakes_are_one_line(trained, tmp_path, capsys):
    weights, out = trained / "weights", ["--out", tmp_path / "out"]
    for command, words, message in [
        (
            export,
            [trained, *out, "--checkpoint", 1],
            "choose newest, best or one of 2, 3, 4",
        ),
        (export, [weights, *out, "--checkpoint", 3], "has no checkpoints"),
        (export, [tmp_path / "nowhere", *out], "is no model"),
        (export, [tmp_path, *out], "config.json cannot be read"),
        (export, [trained, "--out", trained], "is not empty"),
        (export, [trained, *out, "--tokenizer", "x.json"], "x.json is not a file"),
        (evaluate, [weights], "is no run, and has no text of its own; give --data"),
        (evaluate, [trained, "--data", "no.txt"], "no.txt"),
        (evaluate, [trained, "--tokens", 0], "--tokens must be at least 1"),
        (generate, [trained, "--top-p", 0], "--top-p must be above 0"),
        (generate, [trained, "--temperature", 0, "--top-p", 0.5], "has no effect"),
        (generate, [trained, "--tokns", 3], "did you mean --tokens?"),
        (generate, [trained, "--prompt", "a\udc80b"], "--prompt cannot be encoded"),
        (
            generate,
            [trained, "--checkpoint", "\u00b2"],
            "choose newest, best or one of",
        ),
        (evaluate, [trained, "--json", "nowhere/x.json"], "nowhere/x.json: its direct"),
        (generate, [], "DIRECTORY"),
    ]:
        assert call(command, *words) == 2, words
        assert message in one_error_line(capsys)


@pytest.mark.usefixtures("one_device")
def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    newest = max(
        (copy / "checkpoints/4/state").rglob("*"), key=lambda x: x.stat().st_size
    )
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert call(export, copy, "--out", tmp_path / "out") == 2
    assert "checkpoints/4 is damaged" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()
    assert call(export, copy, "--out", tmp_path / "out", "--checkpoint", "2") == 0


def test_the_overview_lists_every_command(capsys):
    overview()
    lines = capsys.readouterr().out.splitlines()[1:]
    listed = [line.split()[2].removeprefix("experiments.") for line in lines]
    assert listed == list(COMMANDS)
    files = Path(evaluate.__file__).parent.glob("*.py")
    found = {path.stem for path in files if "sys.exit(main())" in path.read_text()}
    assert set(COMMANDS) == found


def test_what_a_run_began_from_has_a_shape_without_its_tensors(trained, tmp_path):
    shutil.copy(trained / "weights/config.json", tmp_path)

    assert load._shape_of(tmp_path) == load_llama(trained / "weights")[0]


def test_a_best_step_whose_checkpoint_was_not_kept_is_not_offered(tmp_path, capsys):
    record = tmp_path / "checkpoints/4/run/metadata"
    record.parent.mkdir(parents=True)
    progress = {"best": {"step": 2, "validation_loss": 1.0}}
    fields = {"config": {"keep_best": False}, "progress": progress}
    record.write_text(json.dumps({**fields, "token_digest": "", "data_state": None}))
    assert call(generate, tmp_path, "--checkpoint", "best") == 2
    assert "has not kept one; train with --keep-best" in one_error_line(capsys)
