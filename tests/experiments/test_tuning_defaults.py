"""What the optimizers have in fine-tuning, where the flags are silent."""

import dataclasses
import inspect
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from experiments.arguments import groups_of, parse_arguments
from experiments.errors import UserError
from experiments.model.encoder import init_encoder
from experiments.model.encoder_shape import EncoderConfig
from experiments.optim import options, tuning
from experiments.optim.build import build_optimizer
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.schedule import make_schedule
from experiments.optim.tuning import TUNING, TuningOptions, with_tuning_defaults
from experiments.run.memory import block_state
from experiments.run.settings import to_json
from experiments.tuning.config import TUNING as COMMAND
from experiments.tuning.config import complete

pytestmark = pytest.mark.usefixtures("fast_compilation")


def filled(**flags):
    found = TuningOptions(**flags)
    return dataclasses.replace(found, **with_tuning_defaults(found, steps=50))


ENCODER = EncoderConfig(
    kind="bert",
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_labels=2,
)
SHAPES = jax.eval_shape(lambda: init_encoder(ENCODER, jax.random.key(0)))
# Of stacks, and the pooler.
BLOCK_MATRICES = 6 * 2 + 1


# With them the least rank falls.
FALLING = {"final_min_rank", "min_rank_steps"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_trains_an_encoder_with_its_defaults(name):
    flags = filled(optimizer=name)
    assert TUNING[name].keys() <= {"block_scale", *OPTIMIZERS[name].own}
    assert flags.block_scale == TUNING[name]["block_scale"]
    unset = {own for own in OPTIMIZERS[name].own if getattr(flags, own) is None}
    # None is a choice here: neurons keep their sizes, and each method has its basis.
    assert unset <= {"neuron_decay", "basis", "residual", *FALLING}
    subspaces = lowrank_optax.subspaces(jax.eval_shape(made(flags).init, SHAPES))
    ranks = sum(math.prod(slot.rank.shape) for slot in subspaces.values())
    assert ranks in (0, BLOCK_MATRICES)


def made(flags):
    return build_optimizer(flags, lambda _: 0.1, head_schedule=lambda _: 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "projfactor", "low_rank_muon", "apollo"])
def test_updates_of_an_encoder_have_the_shapes_of_its_parameters(name):
    tx = made(filled(optimizer=name))
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), SHAPES)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, SHAPES)


def test_galore_of_optax_projects_the_pooler_beside_the_stacks():
    state = jax.eval_shape(made(filled(optimizer="optax_galore")).init, SHAPES)
    projectors = jax.tree.leaves(optax.tree.get(block_state(state), "projector"))
    assert len(projectors) == BLOCK_MATRICES
    assert all(projector.shape[1] == 8 for projector in projectors)


def test_a_new_head_has_its_own_rate():
    params = {"blocks": {"up": jnp.ones((2, 9, 9))}, "classifier": jnp.ones((9, 2))}
    tx = made(filled(optimizer="adamw", clip_norm=None))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    # Adam's first update is its rate, but for rounding.
    np.testing.assert_allclose(updates["blocks"]["up"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["classifier"], -0.5, rtol=1e-4)


def test_ranks_are_eight_or_as_given_and_may_halve():
    assert (filled().rank, filled().min_rank) == (8, 4)
    assert (filled(rank=1).rank, filled(rank=1).min_rank) == (1, 1)
    assert filled(rank=6, min_rank=2).min_rank == 2
    assert filled(optimizer="galore", rank=4).min_rank is None
    assert filled(block_state_bytes="1MB").rank is None


@pytest.mark.parametrize(("weight", "rank"), [(0.0, 4), (None, 5)])
def test_the_last_gradient_decides_the_rank_unless_the_past_has_weight(weight, rank):
    # Of rank 1: the floor is 4, and the mean of 1 and 8 is 4.5.
    params = {"blocks": {"up": jnp.ones((1, 20, 20))}}
    tx = made(filled(rank_smoothing=weight))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    (slot,) = lowrank_optax.subspaces(state).values()
    assert slot.rank.item() == rank


def test_intervals_that_are_given_move_the_bounds_that_are_not():
    assert filled(max_refresh_interval=10).min_refresh_interval == 10
    assert filled(min_refresh_interval=900).max_refresh_interval == 900


def test_a_short_warm_up_and_a_line_down_to_zero():
    schedule = make_schedule(filled(learning_rate=1.0), 50)
    rates = [np.asarray(schedule(count)).item() for count in range(50)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[-1] == pytest.approx(0)
    assert rates[26] == pytest.approx(23 / 47)


def test_flags_with_other_defaults_stand_in_the_groups_of_the_same_names():
    assert list(groups_of(TuningOptions)) == list(groups_of(options.OptimizerOptions))
    assert groups_of(TuningOptions)["schedule"] is tuning.ScheduleFlags
    found = parse_arguments(TuningOptions, "", ["--rank", "4", "--no-compact"])
    assert found == TuningOptions(rank=4, compact=False)
    assert TuningOptions().compact


def test_the_help_of_an_option_of_one_method_names_its_default():
    source = inspect.getsource(tuning.OneMethodFlags).replace("    #: ", "")
    adarankgrad = filled()
    for name in (
        "threshold",
        "rank_smoothing",
        "min_refresh_interval",
        "max_refresh_interval",
    ):
        text = " ".join(source[: source.index(f"{name}: ")].split())
        stated = re.findall(r"None: (\S+) of adarankgrad", text)[-1]
        assert float(stated) == getattr(adarankgrad, name)


def test_the_help_of_the_scale_names_the_methods_that_have_four():
    source = " ".join(inspect.getsource(tuning.ScheduleFlags).replace("#:", "").split())
    text = re.findall(r"None: 4 of (.*?), whose", source)[0]
    named = set(text.replace(" and ", ", ").split(", "))
    assert named == {k for k, v in TUNING.items() if v["block_scale"] == 4}
    assert {v["block_scale"] for v in TUNING.values()} == {1, 4}


@pytest.mark.parametrize("task", ["mrpc", "regression", "gsm8k", "completion"])
@pytest.mark.parametrize("name", ["adamw", "galore", "lora"])
def test_the_file_of_a_run_spells_the_run(task, name, tmp_path):
    """What a run writes down is no mistake when it is resumed, or used by --config."""
    words = ["--task", task, "--optimizer", name, "--train", "examples.jsonl"]
    given = COMMAND.parse(words)
    whole = complete(given, steps_per_epoch=10)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(whole)))
    again = COMMAND.parse(["--config", str(path)])
    assert complete(again, steps_per_epoch=99) == whole


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--learning-rate 0.25", "head_learning_rate", 0.25),
        ("--steps 500", "warmup_steps", 30),
        ("--optimizer sumo", "update_proj_gap", 200),
        ("--epochs 2", "steps", 20),
        ("--epochs 2", "warmup_steps", 1),
        ("--seed 1", "steps", 30),
    ],
)
@pytest.mark.parametrize("task", ["mrpc", "gsm8k"])
def test_defaults_of_a_file_follow_the_flags(task, flags, name, value, tmp_path):
    if task == "gsm8k" and name == "head_learning_rate":
        value = None
    words = ["--task", task, "--optimizer", "galore", "--train", "examples.jsonl"]
    whole = complete(COMMAND.parse(words), steps_per_epoch=10)
    (tmp_path / "config.json").write_text(json.dumps(to_json(whole)))
    config = COMMAND.parse([f"--config={tmp_path}/config.json", *flags.split()])
    assert getattr(complete(config, steps_per_epoch=10), name) == value


def test_a_head_keeps_a_rate_of_its_own(tmp_path):
    words = [
        "--task",
        "mrpc",
        "--train",
        "examples.jsonl",
        "--head-learning-rate",
        "0.5",
    ]
    whole = complete(COMMAND.parse(words), steps_per_epoch=10)
    (tmp_path / "config.json").write_text(json.dumps(to_json(whole)))
    config = COMMAND.parse(
        [f"--config={tmp_path}/config.json", "--learning-rate", "0.25"]
    )
    assert complete(config, steps_per_epoch=10).head_learning_rate == 0.5


@pytest.mark.parametrize(("flag", "steps"), [("--epochs=5", 50), ("--steps=40", 40)])
def test_a_resumed_run_takes_another_length(flag, steps, tmp_path):
    words = ["--task", "mrpc", "--train", "examples.jsonl", "--epochs", "3"]
    whole = complete(COMMAND.parse(words), steps_per_epoch=10)
    (tmp_path / "config.json").write_text(json.dumps(to_json(whole)))
    config = COMMAND.parse([f"--out={tmp_path}", "--resume", flag])
    assert complete(config, steps_per_epoch=10).steps == steps


@pytest.mark.parametrize("task", ["classification", "stsb"])
def test_a_missing_library_of_metrics_is_told_before_anything_begins(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"need scikit-learn; .*'\.\[finetune\]'.*, or"):
        COMMAND.parse(["--task", task, "--train", "x.csv", "--validation", "x.csv"])
    # What is wrong in the flags is told first.
    with pytest.raises(UserError, match="adamm"):
        COMMAND.parse(["--optimizer", "adamm"])


def test_answers_need_no_library_of_metrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    COMMAND.parse(["--task", "gsm8k", "--model", "x", "--train", "x.jsonl"])
