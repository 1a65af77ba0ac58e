"""The configuration of a run: its flags and what they may be."""

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import lowrank_optax
from experiments.arguments import check_choice, flag, parse_arguments
from experiments.errors import UserError
from experiments.model.shape import MODELS
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.options import OptimizerOptions, with_defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OptimizerOptions):
    """Pre-trains a LLaMA on text with a low-rank optimizer.

    Without flags: the tiny model, AdaRankGrad, the sources of Python's own standard
    library, a few minutes on two cores. Results go to --out: summary.json,
    metrics.jsonl, figures, TensorBoard events and checkpoints.
    """

    #: Size of the LLaMA: tiny (made for bytes), or about that many parameters with a
    #: vocabulary of 32,000.
    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS) + "}")] = "tiny"
    #: Directory with a Hugging Face LLaMA (config.json, *.safetensors) to start from;
    #: its shape takes the place of --model, --kv-heads and --tied-embeddings. None:
    #: random weights.
    initial_weights: Path | None = None
    #: Heads of keys and values; a divisor of the model's heads. None: as many as heads.
    kv_heads: int | None = None
    #: Use the embedding as the head too.
    tied_embeddings: bool = False
    #: Recompute each layer in the backward pass: less memory, about a third slower.
    remat: bool = False
    #: Type of activations and matrix products.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: Type of parameters and gradients. Moments in a subspace are float32; those at
    #: full size (AdamW's) have this type, as optax keeps them. None: that of
    #: --initial-weights, else float32.
    param_dtype: Literal["float32", "bfloat16"] | None = None
    #: Text to train on: embedded (Python's standard library), c4 (streamed from Hugging
    #: Face), or a path or glob of .json.gz, .jsonl, .txt or .txt.xz files.
    data: str = "embedded"
    #: Path or glob of the validation text. None: held out from --data.
    validation_data: str | None = None
    #: bytes (UTF-8, 257 tokens), or the path of a SentencePiece .model or of a Hugging
    #: Face tokenizer.json. None: the tokenizer.json or tokenizer.model beside
    #: --initial-weights, else bytes.
    tokenizer: str | None = None
    #: Sequences per step, over all devices; a multiple of their number.
    batch_size: int = 8
    #: Micro-batches that a batch is cut into, one after the other: less memory for the
    #: same update; a divisor of --batch-size. Their gradients are added up inside the
    #: subspaces.
    accumulate: int = 1
    #: Tokens per sequence; at least 1.
    sequence_length: int = 128
    #: Updates to train for; at least 1.
    steps: int = 800
    #: Seed of the weights, of the order of the data and of the optimizer's draws; 0 or
    #: more.
    seed: int = 0
    #: Directory of the results. None: a new one under runs/.
    out: Path | None = None
    #: Continue the run in --out from its last complete checkpoint, bit for bit; the
    #: other flags must be those it was started with.
    resume: bool = False
    #: Free columns of the optimizer's state that have not been wanted for four looks,
    #: or, with --block-state-bytes, spread them over the matrices by captured energy.
    #: The step is compiled again then.
    compact: bool = False
    #: Steps between two looks of --compact; at least 1.
    compact_every: int = 50
    #: Steps between two lines of metrics.jsonl; at least 1.
    log_every: int = 10
    #: Steps between two validations; at least 1. There is one before the first step and
    #: one after the last in any case.
    eval_every: int = 100
    #: Tokens of each validation, the same ones each time; at least 1. Fewer where the
    #: validation text is shorter.
    eval_tokens: int = 32768
    #: Steps between two checkpoints; at least 1. There is one after the last step in
    #: any case.
    checkpoint_every: int = 200
    #: Newest checkpoints to keep; at least 1.
    keep_checkpoints: int = 2
    #: Write the trained model to weights/ in --out, as a Hugging Face LLaMA.
    save_weights: bool = False
    #: Tokens of the sample of text at the end; 0 or more.
    sample_tokens: int = 96
    #: Temperature of the sample; 0 is greedy.
    sample_temperature: float = 0.8

    @property
    def model_name(self) -> str:
        """Of the preset, or of the directory of the initial weights."""
        return self.initial_weights.name if self.initial_weights else self.model


# Fields that do not change what is computed: they may differ when a run is resumed.
FREE_FIELDS = frozenset(
    {
        "out",
        "resume",
        "log_every",
        "eval_every",
        "eval_tokens",
        "checkpoint_every",
        "keep_checkpoints",
        "save_weights",
        "sample_tokens",
        "sample_temperature",
    }
)

_POSITIVE_INT = (lambda value: value >= 1, "at least 1")
_POSITIVE = (lambda value: 0 < value < math.inf, "above 0 and finite")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or more and finite")
_DECAY = (lambda value: 0 <= value < 1, "0 or more and below 1")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": _POSITIVE,
    "block_scale": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "final_learning_rate_fraction": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "weight_decay": _NOT_NEGATIVE,
    "b1": _DECAY,
    "b2": _DECAY,
    "eps": _POSITIVE,
    "clip_norm": _POSITIVE,
    "rank": _POSITIVE_INT,
    "threshold": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "min_rank": _POSITIVE_INT,
    "min_refresh_interval": _POSITIVE_INT,
    "max_refresh_interval": _POSITIVE_INT,
    "update_proj_gap": _POSITIVE_INT,
    "granularity": _POSITIVE_INT,
    "power_iterations": (
        lambda value: value >= 0 and (2 * value) % 1 == 0,
        "a multiple of 0.5, 0 or more",
    ),
    "momentum": _DECAY,
    "residual": _NOT_NEGATIVE,
    "accumulate": _POSITIVE_INT,
    "kv_heads": _POSITIVE_INT,
    "batch_size": _POSITIVE_INT,
    "sequence_length": _POSITIVE_INT,
    "steps": _POSITIVE_INT,
    "seed": (lambda value: 0 <= value < 2**31, "0 or more and below 2**31"),
    "compact_every": _POSITIVE_INT,
    "log_every": _POSITIVE_INT,
    "eval_every": _POSITIVE_INT,
    "eval_tokens": _POSITIVE_INT,
    "checkpoint_every": _POSITIVE_INT,
    "keep_checkpoints": _POSITIVE_INT,
    "sample_tokens": _NOT_NEGATIVE,
    "sample_temperature": _NOT_NEGATIVE,
}


def parse(argv: Sequence[str]) -> Config:
    """Returns the configuration that the arguments spell, each value checked.

    Raises:
        UserError: If a flag or a value is not one of ours.
        SystemExit: With status 0, after ``--help``.
    """
    config = parse_arguments(Config, "python -m experiments.pretrain_llama", argv)
    check(config)
    return config


def check(config: Config) -> None:
    """Checks each value by itself.

    Raises:
        UserError: If one is out of its range or unknown.
    """
    check_choice("--model", config.model, MODELS)
    check_choice("--optimizer", config.optimizer, OPTIMIZERS)
    for name, (is_allowed, requirement) in _RULES.items():
        value = getattr(config, name)
        if value is not None and not is_allowed(value):
            raise UserError(f"{flag(name)} must be {requirement}, not {value}")
    if config.block_state_bytes is not None:
        _check_budget(config)
    if config.basis_bits and "rank" not in OPTIMIZERS[config.optimizer].own:
        raise UserError(f"{config.optimizer} has no projections for --basis-bits")
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size "
            f"{config.batch_size}; choose a divisor"
        )
    if config.resume and config.out is None:
        raise UserError("--resume needs --out, the directory of the run to continue")


def _check_budget(config: Config) -> None:
    if config.optimizer not in ("galore", "adarankgrad"):
        raise UserError(
            f"--block-state-bytes does not work with {config.optimizer}; choose galore "
            "or adarankgrad, or give --rank"
        )
    try:
        lowrank_optax.budget(config.block_state_bytes or "")
    except ValueError as error:
        raise UserError(f"--block-state-bytes: {error}") from error


def complete(config: Config, hidden_size: int) -> Config:
    """Returns the configuration with None replaced by the optimizer's defaults.

    Args:
        config: Checked.
        hidden_size: Of the model; the default rank is a share of it.

    Raises:
        UserError: If two values contradict each other.
    """
    defaults = with_defaults(config, steps=config.steps, hidden_size=hidden_size)
    config = dataclasses.replace(config, **defaults)
    _check_order(config, "warmup_steps", "steps", strictly=True)
    _check_order(config, "min_rank", "rank")
    _check_order(config, "min_refresh_interval", "max_refresh_interval")
    return config


def to_json(config: Config) -> dict[str, Any]:
    """Returns the fields as values that JSON knows."""
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Returns "--flag was X, is Y" for each field that changes what is computed."""
    now = to_json(config)
    return [
        f"{flag(name)} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted((saved.keys() | now.keys()) - FREE_FIELDS)
        if saved.get(name) != now.get(name)
    ]


def command_line(config: Config) -> str:
    """Returns the command that gives this configuration, without the defaults."""
    words = ["python", "-m", "experiments.pretrain_llama"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name if value else f"no_{field.name}"))
        else:
            words += [flag(field.name), str(value)]
    return shlex.join(words)


def _check_order(config: Config, low: str, high: str, strictly: bool = False) -> None:
    small, large = getattr(config, low), getattr(config, high)
    if small is None or large is None or small < large + (not strictly):
        return
    raise UserError(
        f"{flag(low)} must be {'below' if strictly else 'at most'} {flag(high)} "
        f"({large}), not {small}"
    )
