"""Fine-tuning runs: what they learn, leave behind, refuse, and how they go on."""

import json
import re
import shutil
import statistics
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import generate
from experiments.data.tokenizers import load_tokenizer
from experiments.model.adapters import merged
from experiments.model.encoder import apply_encoder
from experiments.model.encoder_files import load_encoder
from experiments.model.hugging_face import load_llama
from experiments.model.peft import load_peft_adapter
from experiments.run.files import checkpoint_steps
from experiments.tuning.assemble import assemble
from experiments.tuning.config import TUNING
from experiments.tuning.quantities import LINE, SUMMARY
from tests.experiments.small_runs import (
    assert_same_run,
    one_error_line,
    read_lines,
    read_state,
)
from tests.experiments.small_tasks import write_rows
from tests.experiments.small_tuning import tune, write_inputs

pytestmark = pytest.mark.usefixtures("one_device", "fast_compilation")


@pytest.fixture(scope="module")
def flags(tmp_path_factory, inputs):
    # Programs are kept by the fixture of the other command.
    del inputs
    return write_inputs(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def tuned(flags, tmp_path_factory):
    """The directory of a run of 8 steps, 1 1/3 epochs, with a checkpoint at 4."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    saved = ["--save-weights", "--save-adapter", 4, "--checkpoint-every", 4]
    with pytest.MonkeyPatch.context() as patch:
        device = jax.local_devices()[:1]
        patch.setattr("experiments.distribution.mesh.all_devices", lambda: device)
        assert tune(*flags, *saved, "--out", out) == 0
    return out


def read(directory, name="summary.json"):
    return json.loads((directory / name).read_text())


def _norms(matrices):
    return np.linalg.norm(matrices, axis=(-2, -1))


def params_of(directory, step):
    state = read_state(directory, step)
    return {k: v for k, v in state.items() if k.startswith("['params']")}


def test_a_run_says_what_it_has_come_to(tuned):
    summary, lines = read(tuned), read_lines(tuned)
    assert list(summary) == [quantity.name for quantity in SUMMARY]
    assert {x for line in lines for x in line} <= {quantity.name for quantity in LINE}
    validations = {x["step"]: x for x in lines if "validation_metric" in x}
    # One before the first step, one each epoch of 6 steps, and one at the end.
    assert list(validations) == [0, 6, 8]
    assert summary["last_metric"] == validations[8]["validation_metric"]
    assert summary["last_metrics"] == validations[8]["validation_metrics"]
    best = max((6, 8), key=lambda step: validations[step]["validation_metric"])
    assert summary["best_step"] == best
    assert summary["metric"] == "accuracy"
    assert summary["epoch"] == pytest.approx(8 / 6)
    assert summary["compilations"] <= len(summary["bucket_lengths"])
    # Examples of 3 to 21 letters between two special tokens.
    assert summary["tokens"] < 8 * 8 * 23
    assert 4 <= summary["effective_rank"] <= 8
    for name in ("loss.png", "memory.png", "first_spectra.png"):
        assert (tuned / "figures" / name).stat().st_size > 0


def test_a_run_learns(flags, tmp_path):
    learn = ["--steps", 60, "--eval-every", 60, "--learning-rate", 1e-2, "--dropout", 0]
    assert tune(*flags, *learn, "--optimizer", "adamw", "--out", tmp_path / "a") == 0
    summary = read(tmp_path / "a")
    # It was 1; a guess is right in half of them.
    assert summary["last_metric"] > 0.8 > summary["initial_metric"]


def test_what_was_killed_in_an_epoch_is_resumed_bit_for_bit(
    flags, tuned, tmp_path, die_at
):
    out = tmp_path / "out"
    with pytest.raises(die_at(6)):
        tune(*flags, "--checkpoint-every", 4, "--out", out)
    assert checkpoint_steps(out) == [4]
    die_at(None)
    assert tune("--out", out, "--resume") == 0
    assert_same_run(tuned, out, 8)
    ours, theirs = read(tuned), read(out)
    for name in ("tokens", "effective_rank", "best_step", "last_metrics"):
        assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_dropout_can_be_left_out(flags, tuned, tmp_path):
    once = [*flags, "--optimizer", "adamw", "--steps", 1]
    assert tune(*once, "--dropout", 0, "--out", tmp_path / "a") == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "a") if "loss" in line]
    dropped = [line["loss"] for line in read_lines(tuned) if "loss" in line]
    assert losses[0] != dropped[0]
    assert losses[0] == pytest.approx(dropped[0], abs=0.1)


def test_saved_weights_answer_as_the_tuned_model(tuned):
    params = params_of(tuned, 8)
    config, loaded = load_encoder(tuned / "weights", None, jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path({"params": loaded}):
        np.testing.assert_array_equal(leaf, params[jax.tree_util.keystr(path)])
    settings = read(tuned / "weights", "config.json")
    assert settings["id2label"] == {"0": "no", "1": "yes"}
    assert (tuned / "weights/tokenizer.json").exists()
    assert config.num_labels == 2


def test_the_adapter_of_a_run_makes_its_model_of_the_first_one(flags, tuned):
    base = flags[flags.index("--model") + 1]
    config, before = load_encoder(base, 2, jax.random.key(0))
    _, after = load_encoder(tuned / "weights", 2, jax.random.key(0))
    params, scale = load_peft_adapter(tuned / "adapter", before, config)
    with_adapter = merged(params, scale)
    old, new, ours = (
        tree["blocks"]["mlp"]["up"]["kernel"] for tree in (before, after, with_adapter)
    )
    errors = _norms(new - ours) / _norms(new - old)
    found = read(tuned)["adapter"]
    # Differences of float32 weights, of which the changes are a hundredth.
    np.testing.assert_allclose(
        errors, found["errors"]["blocks.mlp.up.kernel"], atol=1e-4
    )
    assert max(errors) < 0.9
    np.testing.assert_array_equal(
        with_adapter["classifier"]["kernel"], after["classifier"]["kernel"]
    )
    assert set(found["metrics"]) == {"accuracy", "macro_f1"}
    assert "embeddings.word" in found["left_out"]


@pytest.mark.slow
def test_lora_trains_its_adapters_and_the_head_and_writes_them(flags, tmp_path):
    out = tmp_path / "out"
    lora = [*flags, "--optimizer", "lora", "--steps", 2]
    assert tune(*lora, "--out", out, "--save-weights") == 0
    base = flags[flags.index("--model") + 1]
    config, before = load_encoder(base, 2, jax.random.key(0))
    params, scale = load_peft_adapter(out / "adapter", before, config)
    _, tuned = load_encoder(out / "weights", 2, jax.random.key(0))
    np.testing.assert_array_equal(
        tuned["embeddings"]["word"], before["embeddings"]["word"]
    )
    tokens = np.arange(4, 24).reshape(2, 10)
    ones = np.ones_like(tokens)
    # Sums of float32 in another order.
    np.testing.assert_allclose(
        apply_encoder(config, merged(params, scale), tokens, ones),
        apply_encoder(config, tuned, tokens, ones),
        atol=1e-5,
    )
    assert read(out)["block_state_bytes"] < read(out)["block_adamw_state_bytes"]


def test_frozen_parameters_stay_and_have_no_state(flags, tuned, tmp_path):
    out = tmp_path / "out"
    frozen = ["--frozen", "embeddings|attention/query", "--steps", 2]
    assert tune(*flags, *frozen, "--optimizer", "adamw", "--out", out) == 0
    base = flags[flags.index("--model") + 1]
    _, before = load_encoder(base, 2, jax.random.key(0))
    params = params_of(out, 2)
    for path, leaf in jax.tree.leaves_with_path({"params": before}):
        name = jax.tree_util.keystr(path)
        is_frozen = "embeddings" in name or "['query']" in name
        if is_frozen:
            np.testing.assert_array_equal(params[name], leaf, err_msg=name)
        elif "kernel" in name:
            assert not np.array_equal(params[name], leaf), name
    state = [k for k in read_state(out, 2) if k.startswith("['opt_state']")]
    assert not any("word" in k or "query" in k for k in state)
    assert any("value" in k for k in state)


def test_an_adapter_of_frozen_matrices_is_refused(flags, tmp_path, capsys):
    frozen = ["--frozen", "embeddings|blocks|pooler", "--save-adapter", 4]
    assert tune(*flags, *frozen, "--out", tmp_path / "out") == 2
    assert "leaves no block matrix to train, and --save-ad" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_frozen_adapters_are_found_by_the_names_of_their_matrices(flags, tmp_path):
    out = tmp_path / "out"
    lora = ["--optimizer", "lora", "--steps", 2, "--frozen", "blocks/attention"]
    assert tune(*flags, *lora, "--out", out) == 0
    params = params_of(out, 2)
    ups = {k: x for k, x in params.items() if "adapters" in k and k.endswith("['up']")}
    assert len(ups) == 7
    for name, up in ups.items():
        # It begins at zero.
        assert np.any(up) == ("attention" not in name), name


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        # LoRA trains none of them.
        ("embeddings", "finds no parameter that is trained; .*attention/key/kernel/up"),
        ("", "leaves nothing to train"),
    ],
)
def test_what_leaves_the_training_as_it_is_is_refused(
    frozen, message, flags, tmp_path, capsys
):
    words = ["--optimizer", "lora", "--frozen", frozen, "--out", tmp_path / "out"]
    assert tune(*flags, *words) == 2
    assert re.search(message, one_error_line(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_restart_of_relora_draws_as_its_start(flags, tmp_path):
    relora = ["--optimizer", "relora", "--rank", 4, "--update-proj-gap", 2]
    assert tune(*flags, "--steps", 2, *relora, "--out", tmp_path / "out") == 0
    state = read_state(tmp_path / "out", 2)
    drawn = [x for name, x in state.items() if re.search("params.*'down'\\]$", name)]
    # Uniform on +-1 / sqrt(n), as PEFT's: some number of a normal draw is larger.
    assert drawn
    for down in drawn:
        assert 0.5 < np.max(np.abs(down)) * down.shape[-2] ** 0.5 <= 1


@pytest.mark.slow
def test_seeds_have_a_table_of_mean_and_deviation(flags, tmp_path, capsys):
    out = tmp_path / "out"
    several = [*flags, "--steps", 2, "--seeds", 2, "--optimizer", "adamw", "--out", out]
    assert tune(*several) == 0
    found = read(out, "seeds.json")
    losses = [read(out / f"seed-{i}")["validation_loss"] for i in (0, 1)]
    assert losses[0] != losses[1]
    assert found["mean"]["validation_loss"] == pytest.approx(statistics.mean(losses))
    deviation = statistics.stdev(losses)
    assert found["deviation"]["validation_loss"] == pytest.approx(deviation)
    assert "deviation" in capsys.readouterr().out
    # What is done is not done again.
    assert tune("--out", out, "--resume") == 0
    assert "at first" not in capsys.readouterr().out
    assert tune("--out", out, "--resume", "--learning-rate", 0.5) == 2
    assert one_error_line(capsys).count("--learning-rate was") == 1
    assert read(out, "config.json")["learning_rate"] != 0.5
    # More steps, and one more seed.
    capsys.readouterr()
    assert generate.main([str(out)]) == 2
    error = one_error_line(capsys)
    assert f"the runs of several seeds: seed-0, seed-1; give {out}/seed-0/w" in error

    assert tune("--out", out, "--resume", "--steps", 3, "--seeds", 3) == 0
    assert [read(out / f"seed-{i}")["steps"] for i in range(3)] == [3, 3, 3]
    assert len(read(out, "seeds.json")["seeds"]) == 3
    assert tune(*several) == 2
    assert "holds other runs" in one_error_line(capsys)


@pytest.mark.slow
def test_seeds_that_have_all_diverged_have_no_mean(flags, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--optimizer", "adamw", "--learning-rate", 1e30, "--steps", 2]
    assert tune(*flags, *words, "--seeds", 2, "--out", out) == 0
    found = read(out, "seeds.json")
    assert found["validation_loss"] == [None, None]
    assert found["mean"]["validation_loss"] is None
    assert "deviation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("--task mrcp", "'mrcp' is not known.*did you mean mrpc?"),
        ("--task gsm8k", "--task gsm8k needs a LLaMA.* is an encoder"),
        ("--label-column lable", "lable.*label, text|lable.*text, label"),
        ("--epochs 2", "--steps 8 and --epochs 2 both say how long"),
        ("--save-adapter 17", "rank 17 does not fit.*16"),
        ("--save-adapter 2.5", "2.5 is neither a rank nor a share"),
        (
            "--frozen nothing_here",
            "finds no parameter that is trained; their names are .*pooler/kernel",
        ),
        ("--frozen (", "is not a regular expression"),
        ("--frozen .", "--frozen . leaves nothing to train"),
        ("--max-length 99", "99.*32"),
        ("--prompt chat", "--prompt has no effect: --task classification trains"),
        ("--answer-tokens 3", "--answer-tokens has no effect"),
        ("--model nowhere", "nowhere is no model; give minilm"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--rank 16", "--rank 16.*leaves every block matrix at full size"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    flags, mistake, message, tmp_path, capsys
):
    out = tmp_path / "out"
    assert tune(*flags, "--out", out, *mistake.split(" ", 1)) == 2
    assert re.search(message, one_error_line(capsys))
    assert not out.exists()


def test_other_examples_are_not_gone_on_with(flags, tuned, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    train = Path(flags[flags.index("--train") + 1])
    lines = train.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    assert tune("--out", tuned, "--resume", "--steps", 9, "--train", path) == 2
    assert "other text than the run" in one_error_line(capsys)


@pytest.mark.parametrize("most", [1, 8, 21, 22])
def test_the_first_examples_alone_can_be_validated_on(flags, most, tmp_path):
    words = [*flags, "--out", tmp_path / "out", "--validation-examples", most]
    data = assemble(TUNING.parse([str(word) for word in words]), print).work.data
    path = Path(flags[flags.index("--validation") + 1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # The file has 21.
    wanted = [data.label_names.index(row["label"]) for row in rows[:most]]
    assert data.labels("validation").tolist() == wanted
    assert data.train_examples == 44
    assert ("the first" in data.description) == (most < 21)


def test_a_run_goes_on_with_as_many_examples_to_validate_on(
    flags, tuned, tmp_path, capsys
):
    again = ["--out", tuned, "--resume", "--validation-examples"]
    assert tune(*again, 8) == 2
    line = one_error_line(capsys)
    assert "(--validation-examples was None, is 8)" in line
    # All of them, by another value.
    config = TUNING.parse([str(word) for word in (*again, 21)])
    assert assemble(config, print).resumed is not None


def test_commands_of_pre_training_say_where_the_weights_are(tuned, capsys):
    assert generate.main([str(tuned)]) == 2
    assert f"give {tuned / 'weights'}" in one_error_line(capsys)


def test_an_encoder_needs_examples_of_the_task(capsys):
    assert tune("--task", "mrpc") == 2
    assert "mrpc has no examples of its own; give --train" in one_error_line(capsys)


def test_a_llama_is_tuned_on_answers_and_its_adapter_is_saved(tmp_path, inputs):
    model = shutil.copytree(
        inputs[inputs.index("--initial-weights") + 1], tmp_path / "model"
    )
    load_tokenizer("bytes").save(model)
    rows = [
        {"prompt": f"{i} is", "completion": "odd" if i % 2 else "even"}
        for i in range(24)
    ]
    out = tmp_path / "out"
    flags = {
        **{"--task": "completion", "--model": model, "--optimizer": "galore"},
        **{"--train": write_rows(tmp_path / "rows.jsonl", rows), "--batch-size": 8},
        **{"--steps": 3, "--eval-examples": 2, "--save-adapter": 0.9, "--out": out},
        **{"--learning-rate": 1e-2, "--gradients": "full"},
    }
    assert tune(*(word for pair in flags.items() for word in pair)) == 0
    summary = read(out)
    assert list(summary["last_metrics"]) == ["token_accuracy", "exact_match"]
    # Of "even" and "odd" and the end alone: the prompt has no weight.
    assert summary["tokens"] <= 3 * 8 * 5
    config, params = load_llama(model)
    assert load_peft_adapter(out / "adapter", params, config)
    assert max(summary["adapter"]["errors"]["blocks.mlp.up"]) <= 0.1**0.5 + 1e-3
    lines = read_lines(out)
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]


def _add_special_token(settings, word):
    """Adds a token behind all others, as a padding is added to many models' files."""
    (end,) = settings["added_tokens"]
    settings["added_tokens"].append({**end, "id": end["id"] + 1, "content": word})


def test_a_token_that_no_text_has_may_be_beyond_the_model(
    tmp_path, inputs, capsys, flags
):
    del flags
    model = shutil.copytree(
        inputs[inputs.index("--initial-weights") + 1], tmp_path / "model"
    )
    load_tokenizer("bytes").save(model)
    path = model / "tokenizer.json"
    settings = json.loads(path.read_text())
    _add_special_token(settings, "<pad>")
    path.write_text(json.dumps(settings))
    assert load_tokenizer(str(path)).vocab_size == 258
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": x} for x in "bc"]
    )
    words = ["--task", "completion", "--model", model, "--train", rows]
    words += ["--optimizer", "adamw", "--steps", 1, "--batch-size", 2]
    assert tune(*words, "--out", tmp_path / "out", "--save-weights") == 0
    capsys.readouterr()
    assert generate.main([str(tmp_path / "out/weights"), "--tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "has no tokenizer; put"),
        ("larger", "has 300 tokens, the model .* 257"),
        ("chat", "the chat template writes the token 257, the model has 0 to 256"),
    ],
)
def test_a_llama_needs_the_tokenizer_that_it_was_trained_with(
    tokenizer, message, tmp_path, inputs, capsys
):
    model = shutil.copytree(
        inputs[inputs.index("--initial-weights") + 1], tmp_path / "model"
    )
    if tokenizer:
        load_tokenizer("bytes").save(model)
        path = model / "tokenizer.json"
        settings = json.loads(path.read_text())
        if tokenizer == "larger":
            settings["model"]["vocab"]["one more"] = 299
        else:
            _add_special_token(settings, "<user>")
            template = "<user>{% for m in messages %}{{ m.content }}{% endfor %}"
            (model / "chat_template.jinja").write_text(template)
        path.write_text(json.dumps(settings))
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": x} for x in "bc"]
    )
    words = ["--task", "completion", "--model", model, "--train", rows]
    assert tune(*words, "--out", tmp_path / "out") == 2
    assert re.search(message, one_error_line(capsys))
    assert not (tmp_path / "out").exists()
