"""The flags of a run, in the groups of its help; beside the optimizer's."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.model.shape import MODELS
from experiments.optim.options import OptimizerOptions
from experiments.ranges import AtLeastOne, Count, NotNegative, Positive, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model, and the numbers that it is made of."""

    #: Size of the LLaMA: tiny and 5m (made for bytes), or about that many parameters
    #: with a vocabulary of 32,000.
    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(MODELS) + "}")] = "tiny"
    #: Directory with a Hugging Face LLaMA (config.json, *.safetensors), or GGUF
    #: file, to start from; its shape takes the place of --model, --kv-heads and
    #: --tied-embeddings. None: random weights.
    initial_weights: Path | None = None
    #: Heads of keys and values; a divisor of the model's heads. None: as many as heads.
    kv_heads: AtLeastOne | None = None
    #: Use the embedding as the head too.
    tied_embeddings: bool = False
    #: Keep the layers in stacks, which are scanned: they compile once. Else each layer
    #: has arrays of its own in the optimizer's state, of which columns are freed by
    #: layer and not by stack; compilation takes longer with each layer.
    scan_layers: bool = True
    #: Type of activations and matrix products.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: Type of parameters and gradients. Moments in a subspace are float32; those at
    #: full size (AdamW's) have this type, as optax keeps them. None: that of
    #: --initial-weights, else float32.
    param_dtype: Literal["float32", "bfloat16"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The text, and how it becomes batches."""

    #: Text to train on: embedded (Python's standard library); a file, folder or quoted
    #: glob of .jsonl, .json, .txt (also .gz, .xz, .bz2, .zst) or .parquet; or streamed
    #: from Hugging Face, c4 or hub:OWNER/NAME[:CONFIGURATION[:SPLIT]].
    data: str = "embedded"
    #: Text to validate on, named as for --data. None: the validation split of a data
    #: set that has one; else a part held out from --data.
    validation_data: str | None = None
    #: Column that holds the text, in JSON lines, Parquet and data sets of the hub.
    text_column: str = "text"
    #: bytes (UTF-8, 257 tokens), or the path of a SentencePiece .model or of a Hugging
    #: Face tokenizer.json. None: the tokenizer.json or tokenizer.model beside
    #: --initial-weights, else bytes.
    tokenizer: str | None = None
    #: Sequences per step, over all devices; a multiple of their number.
    batch_size: AtLeastOne = 8
    #: Tokens per sequence; at least 1.
    sequence_length: AtLeastOne = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """How long the run is, and where its settings come from."""

    #: File of settings: the config.json that a run writes in --out. Flags on the
    #: command line win. The file's --out and --resume are not used. With another
    #: --optimizer than the file's, nor are its --block-scale and the options that only
    #: some optimizers have.
    config: Path | None = None
    #: Updates to train for; at least 1.
    steps: AtLeastOne = 800
    #: Seed of the weights, of the order of the data and of the optimizer's draws; 0 or
    #: more.
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """When the model is validated, and on how much."""

    #: Steps between two validations; at least 1. There is one before the first step and
    #: one after the last in any case.
    eval_every: AtLeastOne = 100
    #: Tokens of each validation, the same ones each time; at least 1. Fewer where the
    #: validation text is shorter.
    eval_tokens: AtLeastOne = 32768


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingFlags:
    """What is measured on the way."""

    #: Steps between two lines of metrics.jsonl; at least 1.
    log_every: AtLeastOne = 10
    #: Project of Weights & Biases that gets the numbers too, beside TensorBoard; needs
    #: the extra "wandb". WANDB_MODE=offline keeps them in --out. None: no W&B.
    wandb: str | None = None
    #: START:STOP, the first and the last step of a trace by jax.profiler, which goes to
    #: profile/ in --out; steps count from 1. None: no trace.
    profile: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """What is saved on the way, and how to continue."""

    #: Continue the run in --out from its last complete checkpoint, bit for bit. Where
    #: there is none, start it. Flags that are left out are as in its config.json. Paths
    #: may be others if the text is the same. Larger --steps extend the run: from the
    #: checkpoint on, the learning rate is that of a run of the new length with the same
    #: warm-up. What else would be computed otherwise is refused.
    resume: bool = False
    #: With --resume: continue with the other settings that are given here, as far as
    #: the checkpoint fits them. config.json and summary.json list them by step.
    allow_changes: bool = False
    #: Steps between two checkpoints; at least 1. There is one after the last step in
    #: any case.
    checkpoint_every: AtLeastOne = 200
    #: Minutes between two checkpoints, beside --checkpoint-every; above 0. None: steps
    #: alone count.
    checkpoint_minutes: Positive | None = None
    #: Newest checkpoints to keep; at least 1.
    keep_checkpoints: AtLeastOne = 2
    #: Keep the checkpoint of the best validation too; summary.json names its step. Each
    #: validation that is better than all before makes a checkpoint.
    keep_best: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """The devices, and the processes that have them."""

    #: Devices along each axis, like data=2,fsdp=4 or fsdp=4,tensor=2. data: copies of
    #: the model. fsdp: shares of each copy's parameters and optimizer state; data and
    #: fsdp share out the batch. tensor: shares of heads and of the MLP. data has what
    #: is left. None: all devices are on data.
    mesh: str | None = None
    #: Memory that the optimizer's state is in: device; or pinned_host, the host's, from
    #: which each step moves arrays of 64 KiB and more to the devices for their use.
    state_memory: Literal["device", "pinned_host"] = "device"
    #: HOST:PORT of process 0, for a run of several processes, each of which is started
    #: with this flag; or auto, what JAX detects of SLURM, Open MPI, Kubernetes or Cloud
    #: TPU. None: one process.
    coordinator: str | None = None
    #: Processes in all; at least 1. None: detected.
    num_processes: AtLeastOne | None = None
    #: Number of this process, from 0 on. None: detected.
    process_id: Count | None = None
    #: Seconds without a sign of life after which a process counts as dead, and ends the
    #: others; above 0. As long may the processes take to come.
    process_timeout: Positive = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What the run leaves behind."""

    #: Directory of the results. None: a new one under runs/.
    out: Path | None = None
    #: Write the trained model to weights/ in --out, in Hugging Face's layout.
    save_weights: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The sample of text at the end."""

    #: Tokens of the sample of text at the end; 0 or more.
    sample_tokens: Count = 96
    #: Temperature of the sample; 0 is greedy.
    sample_temperature: NotNegative = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    SampleFlags,
    OutputFlags,
    DeviceFlags,
    CheckpointFlags,
    LoggingFlags,
    ValidationFlags,
    RunFlags,
    OptimizerOptions,
    DataFlags,
    ModelFlags,
):
    """Pre-trains a LLaMA on text with a low-rank optimizer.

    Without flags: the tiny model, AdaRankGrad, the sources of Python's own standard
    library, a few minutes on two cores. Results go to --out: summary.json,
    metrics.jsonl, figures, TensorBoard events and checkpoints.
    """

    @property
    def model_name(self) -> str:
        """Of the preset, or of the directory of the initial weights."""
        return self.initial_weights.name if self.initial_weights else self.model
