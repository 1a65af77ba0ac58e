"""What fine-tuning begins with: adapters are gone on with, or merged."""

import re
import shutil

import jax
import numpy as np
import pytest

from experiments import export
from experiments.data.tokenizers import load_tokenizer
from experiments.model.adapters import block_matrices, merged, with_adapters
from experiments.model.encoder_files import load_encoder
from experiments.model.hugging_face import load_llama
from experiments.model.peft import load_peft_adapter, save_peft_adapter
from experiments.tuning.assemble import assemble
from experiments.tuning.config import TUNING
from tests.experiments.small_runs import one_error_line
from tests.experiments.small_tasks import write_rows
from tests.experiments.small_tuning import tune, write_inputs

pytestmark = pytest.mark.usefixtures("one_device", "fast_compilation")
RANK, SCALE = 3, 2.0


@pytest.fixture(scope="module")
def flags(tmp_path_factory, inputs):
    # Programs are kept by the fixture of the other command.
    del inputs
    return write_inputs(tmp_path_factory.mktemp("tuning"))


def filled(params, seed=0):
    """Returns parameters with adapters of which no factor is zero."""
    drawn = with_adapters(params, "lora", RANK, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    factors = jax.tree.map(
        lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32),
        drawn["adapters"],
    )
    return {**drawn, "adapters": factors}


@pytest.fixture(scope="module")
def base(flags):
    """Shape and parameters of the encoder, with a head of two labels."""
    return load_encoder(flags[flags.index("--model") + 1], 2, jax.random.key(0))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    config, params = base
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    save_peft_adapter(directory, filled(params), config, "base", SCALE)
    return directory


def parts_of(words):
    return assemble(TUNING.parse([str(word) for word in words]), print)


def assert_close(ours, theirs, **tolerance):
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, one), other in leaves:
        np.testing.assert_allclose(
            one, other, err_msg=jax.tree_util.keystr(path), **tolerance
        )


@pytest.mark.parametrize("optimizer", ["lora", "relora", "galore", "adamw"])
def test_a_run_begins_with_the_model_that_the_adapter_makes(
    flags, base, adapter, optimizer, tmp_path
):
    words = [*flags, "--optimizer", optimizer, "--adapter", adapter]
    config, params = base
    parts = parts_of([*words, "--out", tmp_path / "out"])
    wanted = merged(*load_peft_adapter(adapter, params, config))
    # The scale is a factor of the one or of the other: a rounding.
    assert_close(merged(parts.initial_params()), wanted, atol=1e-6)
    before, after = block_matrices(params), block_matrices(wanted)
    assert all(np.abs(before[name] - after[name]).max() > 0.05 for name in before)


def test_lora_begins_with_the_factors_of_the_adapter_and_their_rank(
    flags, base, adapter, tmp_path
):
    config, params = base
    loaded, scale = load_peft_adapter(adapter, params, config)
    words = [*flags, "--optimizer", "lora", "--adapter", adapter]
    parts = parts_of([*words, "--out", tmp_path / "out"])
    assert parts.config.rank == RANK
    factors = parts.initial_params()["adapters"]
    for name, pair in loaded["adapters"].items():
        np.testing.assert_array_equal(factors[name]["down"], pair["down"])
        np.testing.assert_array_equal(factors[name]["up"], scale * pair["up"])
    # The adapter has the pooler as a whole: new factors, which change nothing yet.
    assert factors.keys() - loaded["adapters"].keys() == {"pooler.kernel"}
    assert not np.any(factors["pooler.kernel"]["up"])


@pytest.mark.slow
def test_lora_trains_the_factors_of_the_adapter(flags, base, adapter, tmp_path):
    config, params = base
    loaded, scale = load_peft_adapter(adapter, params, config)
    out = tmp_path / "out"
    words = [*flags, "--optimizer", "lora", "--adapter", adapter, "--steps", 2]
    assert tune(*words, "--out", out) == 0
    assert tune("--out", out, "--resume", "--steps", 3) == 0
    tuned, one = load_peft_adapter(out / "adapter", params, config)
    assert one == 1
    assert tuned["adapters"].keys() == loaded["adapters"].keys()
    for name, pair in tuned["adapters"].items():
        for part, factor in (("down", 1), ("up", scale)):
            before = factor * loaded["adapters"][name][part]
            assert not np.array_equal(pair[part], before)
            # Three small steps away from where it began.
            np.testing.assert_allclose(pair[part], before, atol=0.1)


def test_an_adapter_that_is_saved_belongs_to_the_model_and_not_to_the_merged_one(
    flags, base, adapter, tmp_path
):
    config, params = base
    out = tmp_path / "out"
    words = [*flags, "--optimizer", "adamw", "--adapter", adapter, "--steps", 3]
    # Full rank, that of the shorter sides: nothing is lost.
    assert tune(*words, "--save-weights", "--save-adapter", 16, "--out", out) == 0
    _, tuned = load_encoder(out / "weights", 2, jax.random.key(0))
    ours = block_matrices(merged(*load_peft_adapter(out / "adapter", params, config)))
    for name, matrix in block_matrices(tuned).items():
        # A decomposition in float32 of entries around 1.
        np.testing.assert_allclose(ours[name], matrix, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--adapter", "nowhere"], "adapter_config.json is missing"),
        (["--rank", 4], f"--rank 4: the adapter in .* has rank {RANK}"),
        (
            ["--task", "regression", "--label-column", "number"],
            r"classifier.*\(2, 16\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    flags, adapter, mistake, message, tmp_path, capsys
):
    row = {"text": "a b y", "label": "yes", "number": 0.5}
    train, validation = (
        write_rows(tmp_path / f"{name}.jsonl", 8 * [row]) for name in ("one", "two")
    )
    words = [*flags, "--train", train, "--validation", validation]
    words += ["--optimizer", "lora", "--adapter", adapter, *mistake]
    assert tune(*words, "--out", tmp_path / "out") == 2
    assert re.search(message, one_error_line(capsys))
    assert not (tmp_path / "out").exists()


def test_a_llama_is_exported_with_an_adapter(inputs, tmp_path, capsys):
    model = shutil.copytree(
        inputs[inputs.index("--initial-weights") + 1], tmp_path / "model"
    )
    load_tokenizer("bytes").save(model)
    config, params = load_llama(model)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    save_peft_adapter(adapter, filled(params), config, str(model), SCALE)
    words = [str(model), "--adapter", str(adapter), "--out", str(out)]
    assert export.main(words) == 0
    assert f"{model} with {adapter}" in capsys.readouterr().out
    wanted = merged(*load_peft_adapter(adapter, params, config))
    assert_close(load_llama(out)[1], wanted, rtol=0)

    assert export.main([*words[:2], str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    assert "adapter_config.json is missing" in one_error_line(capsys)
