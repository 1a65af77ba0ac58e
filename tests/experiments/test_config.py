"""The flags: defaults, mistakes, and the way back to a command line."""

import dataclasses
import json
import re

import pytest

from experiments.arguments import field_names, flag
from experiments.errors import UserError
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS
from experiments.ranges import ranges_of
from experiments.run.changes import changes
from experiments.run.config import PRETRAINING, complete, parse
from experiments.run.flags import Config
from experiments.run.settings import to_json

MISTAKES = [
    ("--optimizer adamww", "'adamww' is not known.*adarankgrad.*mean adamw?"),
    ("--model 61m", "'61m' is not known; choose one of tiny.*did you mean 60m?"),
    ("--stepz 5", "--stepz is not a flag.*did you mean --steps?"),
    ("--steps=5 extra", "extra is not a flag"),
    ("--steps", "Missing value for argument '--steps'"),
    ("--steps five", "--steps: invalid literal for int.*'five'"),
    ("--compute-dtype int8", "'int8'.*--compute-dtype.*float32.*bfloat16"),
    ("--steps 0", "--steps must be at least 1, not 0"),
    ("--rank 0", "--rank must be at least 1, not 0"),
    ("--min-rank -1", "--min-rank must be at least 1, not -1"),
    ("--threshold 0", "--threshold must be above 0 and below 1, not 0"),
    ("--threshold 1", "--threshold must be above 0 and below 1, not 1"),
    ("--threshold nan", "--threshold must be above 0 and below 1, not nan"),
    ("--learning-rate 0", "--learning-rate must be above 0"),
    ("--learning-rate inf", "--learning-rate must be above 0 and finite, not inf"),
    ("--block-scale -1", "--block-scale must be above 0"),
    ("--b1 1", "--b1 must be 0 or more and below 1, not 1"),
    ("--clip-norm 0", "--clip-norm must be above 0"),
    ("--batch-size 0", "--batch-size must be at least 1"),
    ("--sequence-length 0", "--sequence-length must be at least 1"),
    ("--seed -1", "--seed must be 0 or more"),
    ("--keep-checkpoints 0", "--keep-checkpoints must be at least 1"),
    ("--final-learning-rate-fraction 2", "must be from 0 to 1, not 2"),
    ("--resume", "--resume needs --out"),
    ("--out r[1]", r"--out r\[1\]: a checkpoint .* cannot be restored"),
    ("--out runs/a*b/c", "cannot be restored; give another one"),
    ("--compact-every 0", "--compact-every must be at least 1"),
    ("--moment-bits 4", "--moment-bits"),
    ("--schedule step", "--schedule.*cosine.*wsd"),
    ("--schedule wsd --decay-fraction 1", "--decay-fraction must be above 0 and below"),
    ("--profile 10", "--profile must be START:STOP.*not '10'.*--profile 10:12"),
    ("--profile 0:3", "--profile must be START:STOP"),
    ("--profile 7:6", "--profile must be START:STOP"),
    ("--steps 5 --profile 6:7", "--profile 6:7 begins after --steps 5"),
    ("--num-processes 2", "--num-processes 2 needs --coordinator HOST:PORT"),
    ("--process-id 0", "--process-id 0 needs --coordinator HOST:PORT"),
    ("--coordinator node0", "--coordinator node0 is not HOST:PORT, nor auto"),
    ("--coordinator node0:1234", "node0:1234 needs --num-processes; or give.* auto"),
    ("--coordinator a:1 --num-processes 2", "--coordinator a:1 needs --process-id"),
    (
        "--coordinator a:1 --num-processes 2 --process-id 2",
        "--process-id 2: the processes have the numbers 0 to 1",
    ),
    ("--process-timeout 0", "--process-timeout must be above 0"),
    ("--basis-bits 3", "--basis-bits"),
    ("--vocabulary-optimizer none", "--vocabulary-optimizer"),
    ("--block-state-bytes 12XB", "'12XB' is not a number of bytes"),
    (
        "--optimizer vlorp --block-state-bytes 1MB",
        "--block-state-bytes does not work with vlorp; choose adarankgrad, galore,",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line_that_names_the_flag(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        parse(arguments.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--steps 10 --warmup-steps 10",
            r"--warmup-steps must be below --steps \(10\)",
        ),
        ("--rank 4 --min-rank 5", r"--min-rank must be at most --rank \(4\), not 5"),
        (
            "--min-rank 6 --final-min-rank 7",
            r"--final-min-rank must be at most --min-rank \(6\), not 7",
        ),
        (
            "--min-refresh-interval 9 --max-refresh-interval 8",
            r"--min-refresh-interval must be at most --max-refresh-interval \(8\)",
        ),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        complete(parse(arguments.split()), hidden_size=128)


UNUSED = {
    "--initial-weights x --model 60m": "--initial-weights x say the shape",
    # The default too, where it is given.
    "--initial-weights x --model tiny": "--initial-weights x say the shape",
    "--initial-weights x --kv-heads 2": "--initial-weights x say the shape",
    "--initial-weights x --tied-embeddings": "--initial-weights x say the shape",
    "--block-state-bytes 1MB --rank 4": "1MB decides about ranks",
    "--block-state-bytes 1MB --min-rank 4": "1MB decides about ranks",
    "--block-state-bytes 1MB --final-min-rank 4": "1MB decides about ranks",
    "--min-rank-steps 9": "the least rank stays",
    "--residual 1 --gradients subspace": "--residual 1 needs full gradients",
    "--residual 1 --refresh sketch": "gradients are full",
    "--optimizer galore --threshold 0.1": "galore has no such option",
    "--optimizer adamw --rank 4": "adamw has no such option",
    "--optimizer adamw --gradients subspace": "adamw has full gradients",
    "--gradients full --refresh sketch": "gradients are full",
    "--optimizer fira --refresh full": "gradients are full",
    "--optimizer vlorp --refresh sketch": "vlorp draws its bases",
    "--optimizer muon --refresh sketch": "gradients are full with --optimizer muon",
    "--optimizer adamw --basis-bits 4": "adamw stores no bases",
    "--optimizer vlorp --basis-bits 4": "vlorp stores no bases",
    "--optimizer sumo --basis dct --basis-bits 8": "stores numbers of columns",
    "--optimizer sumo --basis dct --power-iterations 1": "no power iterations",
    "--optimizer optax_galore --moment-bits 8": "optax_galore has no moments",
    "--optimizer muon --momentum 0 --moment-bits 8": "muon --momentum 0 has no moments",
    "--optimizer lora --vocabulary-optimizer projected": "trains block matrices only",
    "--rounding nearest": "parameters are float32 without --param-dtype bfloat16",
    "--optimizer galore --compact": "galore uses all columns of its rank",
    "--allow-changes": "there is no --resume",
    "--schedule linear --decay-fraction 0.1": "for --schedule wsd, not linear",
    "--schedule constant --final-learning-rate-fraction 0": "ends at the peak",
    "--compact-every 9": "there is no --compact",
    "--sample-tokens 0 --sample-temperature 1": "no sample with --sample-tokens 0",
}


@pytest.mark.parametrize("arguments", UNUSED)
def test_a_flag_without_effect_is_refused(arguments):
    words = arguments.split()
    (name,) = (word for word in words[-2:] if word.startswith("--"))
    with pytest.raises(UserError, match=f"{name} has no effect: .*{UNUSED[arguments]}"):
        parse(words)
    # What is beside it is fine alone.
    parse(words[: words.index(name)])


@pytest.mark.parametrize(
    "arguments",
    [
        "--optimizer galore --block-state-bytes 1MB --compact",
        "--param-dtype bfloat16 --rounding nearest",
        "--initial-weights x --rounding nearest",
        "--optimizer low_rank_muon --gradients full --basis-bits 4",
        "--optimizer muon --vocabulary-optimizer projected",
    ],
)
def test_flags_with_an_effect_are_not_refused(arguments):
    parse(arguments.split())


def test_a_filled_in_configuration_is_one_that_can_be_given(tmp_path):
    for words in ("--block-state-bytes 1MB", *(f"--optimizer {x}" for x in OPTIMIZERS)):
        written = complete(parse(words.split()), hidden_size=64)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(to_json(written)))
        again = complete(parse(["--config", str(path)]), hidden_size=64)
        assert again == written


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    return re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)


def test_help_explains_every_flag(help_text):
    for name in field_names(Config):
        explanation = re.split(rf"\n +{flag(name)}[ ,]", help_text)[1]
        # What comes before "(default: ...)" is more than the flag and its type.
        words = explanation.split("(default")[0].split()
        assert len(words) > 4, name


def test_help_groups_flags_by_subject(help_text):
    titles = re.findall(r"^ +([\w-]+) options *$", help_text, re.MULTILINE)
    assert titles == [
        *("model", "data", "optimizer", "schedule", "one-method", "memory"),
        *("run", "validation", "logging", "checkpoint", "device", "output", "sample"),
    ]
    groups = dict(zip(titles, re.split(r" options *\n", help_text)[2:], strict=True))
    for name, title in {
        "kv_heads": "model",
        "tokenizer": "data",
        "optimizer": "optimizer",
        "warmup_steps": "schedule",
        "threshold": "one-method",
        "remat": "memory",
        "config": "run",
        "log_every": "logging",
        "resume": "checkpoint",
        "mesh": "device",
        "sample_tokens": "sample",
    }.items():
        assert re.search(rf"\n +{flag(name)}[ ,]", groups[title]), name


def test_help_explains_every_optimizer(help_text):
    text = " ".join(help_text.split())
    for name, method in OPTIMIZERS.items():
        assert f" {name}: {method.help}" in text


def test_the_flags_of_every_range_say_it():
    # Each one of test_a_mistake's, so that no range is a dead letter.
    assert {"steps", "threshold", "sample_tokens", "seed"} <= ranges_of(Config).keys()
    for name in ranges_of(Config):
        with pytest.raises(UserError, match=f"{flag(name)} must be "):
            parse([flag(name), "-1"])


def test_a_configuration_file_gives_the_settings_and_flags_win(tmp_path):
    words = "--optimizer galore --rank 7 --steps 5 --remat --clip-norm None --seed 3"
    written = complete(parse([*words.split(), "--out", "x"]), hidden_size=64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(written)))
    again = complete(parse(["--config", str(path), "--out", "x"]), hidden_size=64)
    assert again == written
    changed = parse(["--seed", "4", f"--config={path}", "--no-remat"])
    changed = complete(changed, hidden_size=64)
    assert changed == dataclasses.replace(written, seed=4, remat=False, out=None)


@pytest.mark.parametrize(
    ("given", "flags", "name", "value"),
    [
        # A default follows the flags of the new run, and what was given does not.
        ("", "--steps 600", "warmup_steps", 60),
        ("--warmup-steps 7", "--steps 600", "warmup_steps", 7),
        ("", "--model 60m", "rank", 192),
        ("--rank 7", "--model 60m", "rank", 7),
        ("", "--rank 16", "min_rank", 14),
        ("--final-min-rank 4", "--steps 600", "min_rank_steps", 400),
        ("", "--schedule wsd", "decay_fraction", 0.2),
        ("--schedule wsd --decay-fraction 0.3", "--seed 1", "decay_fraction", 0.3),
        # The weights' file may be gone, and its model's size with it.
        ("--initial-weights w", "--steps 600", "rank", 48),
    ],
)
def test_defaults_of_a_file_follow_the_flags(given, flags, name, value, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(_completed(given.split()))))
    assert getattr(_completed([f"--config={path}", *flags.split()]), name) == value


def _completed(words):
    config = parse(words)
    return complete(config, hidden_size=MODELS[config.model]["hidden_size"])


def test_a_resumed_run_keeps_the_defaults_that_it_had(tmp_path):
    written = complete(parse([]), hidden_size=64)
    (tmp_path / "config.json").write_text(json.dumps(to_json(written)))
    config = parse(["--resume", f"--out={tmp_path}", "--steps=8000"])
    assert config.warmup_steps == written.warmup_steps == 80


def test_of_a_file_another_optimizer_takes_what_is_not_the_methods(tmp_path):
    written = complete(parse(["--learning-rate", "0.5", "--seed", "3"]), hidden_size=64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(written)))
    config = parse(["--config", str(path), "--optimizer", "sumo"])
    assert (config.learning_rate, config.seed) == (0.5, 3)
    assert (
        complete(config, hidden_size=64).block_scale == OPTIMIZERS["sumo"].block_scale
    )
    assert config.rank is config.threshold is config.min_rank is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no settings by name"),
        ('{"stepz": 1}', "stepz is not a setting; did you mean steps?"),
        ('{"steps": "many"}', "--steps: invalid literal for int.*'many'"),
        ('{"steps": 0}', "--steps must be at least 1, not 0"),
        (None, "No such file or directory; give the config.json of a run"),
    ],
)
def test_a_mistake_in_a_configuration_file_names_it(text, message, tmp_path):
    path = tmp_path / "given.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        parse(["--config", str(path)])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_options_of_the_chosen_optimizer_are_filled_in_and_no_others(optimizer):
    config = complete(parse(["--optimizer", optimizer]), hidden_size=64)
    own = OPTIMIZERS[optimizer].own
    assert config.warmup_steps == config.steps // 10
    assert config.decay_fraction is None
    assert config.block_scale == OPTIMIZERS[optimizer].block_scale
    budget = (24 if optimizer == "adarankgrad" else 16) // own.get("granularity", 1)
    assert config.rank == (budget if "rank" in own else None)
    assert config.granularity == own.get("granularity")
    for name in ("threshold", "min_rank", "update_proj_gap"):
        assert (getattr(config, name) is None) == (name not in own)


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(800, 80), (600, 60), (300, 30), (100, 30), (40, 26), (5, 3), (1, 0)],
)
def test_a_warm_up_is_a_tenth_of_the_run_but_not_of_a_short_one(steps, warmup):
    config = complete(parse(["--steps", str(steps)]), hidden_size=64)
    assert config.warmup_steps == warmup


def test_only_wsd_has_a_decay_of_its_own():
    words = ["--schedule", "wsd"]
    assert complete(parse(words), hidden_size=64).decay_fraction == 0.2
    words += ["--decay-fraction", "0.5"]
    assert complete(parse(words), hidden_size=64).decay_fraction == 0.5


def test_a_value_may_begin_as_a_flag_does():
    config = parse(["--text-column=--b", "--data=x.jsonl"])
    assert PRETRAINING.from_json(to_json(config)) == config


def test_what_the_user_sets_is_kept():
    config = complete(parse(["--rank", "6", "--warmup-steps", "0"]), hidden_size=64)
    assert (config.rank, config.warmup_steps) == (6, 0)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        # One bound moves the other, where that stands at its default.
        ("--min-refresh-interval 400", "max_refresh_interval", 400),
        ("--max-refresh-interval 20", "min_refresh_interval", 20),
        # Bytes take the place of ranks.
        ("--final-min-rank 4 --steps 300", "min_rank_steps", 200),
        ("--steps 300", "min_rank_steps", None),
        ("--block-state-bytes 1MB", "rank", None),
        ("--block-state-bytes 1MB", "min_rank", None),
    ],
)
def test_defaults_fit_what_the_user_sets(arguments, name, value):
    config = complete(parse(arguments.split()), hidden_size=64)
    assert getattr(config, name) == value


def test_changes_are_what_is_computed_otherwise_and_nothing_else():
    config = parse(["--out", "a", "--rank", "7"])
    saved = to_json(config)
    assert changes(saved, config, PRETRAINING) == {}
    free = dataclasses.replace(
        config, log_every=3, keep_checkpoints=9, resume=True, data="elsewhere.txt"
    )
    assert changes(saved, free, PRETRAINING) == {}
    other = dataclasses.replace(config, rank=8, seed=1)
    assert changes(saved, other, PRETRAINING) == {"rank": [7, 8], "seed": [0, 1]}


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default():
    config = parse([])
    saved = to_json(config)
    del saved["schedule"]
    assert changes(saved, config, PRETRAINING) == {}
    other = dataclasses.replace(config, schedule="linear")
    assert changes(saved, other, PRETRAINING) == {"schedule": ["cosine", "linear"]}


def test_the_kinds_of_fields_are_of_fields():
    fields = {field.name for field in dataclasses.fields(Config)}
    kinds = (PRETRAINING.free, PRETRAINING.data, PRETRAINING.fixed)
    assert fields >= frozenset.union(*kinds)
    assert sum(map(len, kinds)) == len(frozenset.union(*kinds))
