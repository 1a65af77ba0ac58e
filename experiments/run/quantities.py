"""What a run writes down: name, unit and meaning of each quantity, in one table."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One entry of a line of metrics.jsonl, or of summary.json.

    Attributes:
        name: Its key in the file.
        unit: Of the number; "" for what is no number.
        meaning: One sentence.
        repeats: Whether two runs of one command on one machine write the same.
    """

    name: str
    unit: str
    meaning: str
    repeats: bool = True

    @property
    def event(self) -> str:
        """Its name in TensorBoard and W&B: in the group eval/ or train/."""
        name = self.name.removeprefix("validation_")
        return f"{'train' if name == self.name else 'eval'}/{name}"


def _measured(name, unit, meaning):
    return Quantity(name, unit, meaning, repeats=False)


_VALIDATION = (
    Quantity(
        "validation_loss",
        "nats per token",
        "Loss on the validation text, the mean over its tokens.",
    ),
    Quantity(
        "validation_perplexity", "", "The exponential of the validation loss in nats."
    ),
    Quantity(
        "validation_bits_per_byte",
        "bits per byte",
        "The validation loss per UTF-8 byte of the text: comparable between "
        "tokenizers.",
    ),
)
_SPEED = (
    _measured(
        "tokens_per_second",
        "tokens/s",
        "Tokens trained on per second, input and logging included; compilation, "
        "validation and checkpoints are left out.",
    ),
    _measured("step_seconds", "s", "Mean duration of a step, measured likewise."),
    _measured(
        "mfu",
        "share",
        "Model FLOPs utilization: the model's FLOP/s over the peak of the devices for "
        "--compute-dtype; null where the peak is not known, as on a CPU.",
    ),
)
_PEAK_MEMORY = _measured(
    "peak_memory_bytes",
    "bytes",
    "The most memory that has been in use since the process started; null where the "
    "device does not say.",
)

# Of a line of metrics.jsonl. Each validation has its entries, the one before the first
# step too, whose line has step 0 and no entries of a step.
STEP = (
    Quantity("step", "updates", "Updates done."),
    Quantity("tokens", "tokens", "Tokens trained on so far."),
    Quantity(
        "epoch",
        "passes",
        "Passes over the training data so far; null where it is streamed.",
    ),
    Quantity("loss", "nats", "Loss of this step's batch, per token or per example."),
    Quantity(
        "learning_rate",
        "",
        "Learning rate of embedding, head and norms in this step; an encoder's new "
        "head has --head-learning-rate.",
    ),
    Quantity(
        "block_learning_rate",
        "",
        "Learning rate of the block matrices in this step: --block-scale times that "
        "of the rest.",
    ),
    Quantity(
        "grad_norm",
        "",
        "Norm of this step's gradient before clipping; with --accumulate or gradients "
        "inside subspaces, of the projected gradient.",
    ),
    *_SPEED,
    _measured(
        "memory_in_use_bytes",
        "bytes",
        "Memory in use: by the allocator of the fullest device; on a CPU, by the "
        "whole process.",
    ),
    _PEAK_MEMORY,
    Quantity(
        "optimizer_state_bytes",
        "bytes",
        "Bytes of the optimizer's state, each array counted once.",
    ),
    Quantity(
        "rejected_updates",
        "updates",
        "Updates left out so far because a gradient was not finite.",
    ),
    Quantity(
        "ranks",
        "columns",
        "Rank in use of each projected matrix: a number, or one per layer. TensorBoard "
        "and W&B have the mean over the layers as rank/NAME.",
    ),
)
# The line of pre-training.
LINE = (*STEP, *_VALIDATION)

# Of the summary of a run whose ranks were added up over all steps; see
# :mod:`experiments.run.effective_rank`.
EFFECTIVE_RANKS = (
    Quantity(
        "effective_rank",
        "columns",
        "R_adap of AdaRankGrad's Section 4: the rank in use, averaged over all steps "
        "and over the matrices, by the sum of their sides; null without projections.",
    ),
    Quantity(
        "effective_rank_share",
        "share",
        "R_adap as the paper prints it: numbers of a basis and of a moment with these "
        "ranks, by numbers of the matrices.",
    ),
    Quantity(
        "effective_rank_by_layer",
        "columns",
        "R_adap of each projected matrix: its rank, averaged over all steps.",
    ),
    Quantity(
        "rank_reduction",
        "numbers",
        "M_red of Section 4: what the ranks saved of a basis and of a moment, on "
        "average, against --rank for all steps; null with --block-state-bytes.",
    ),
)

# Of summary.json, in this order with COSTS behind.
IDENTITY = (
    Quantity("optimizer", "", "Method of the block matrices."),
    Quantity("model", "", "Name of the model."),
    Quantity("steps", "updates", "Updates done."),
    Quantity("tokens", "tokens", "Tokens trained on."),
    Quantity(
        "epoch", "passes", "Passes over the training data; null where it is streamed."
    ),
    Quantity("parameter_count", "numbers", "Parameters of the model."),
)
COSTS = (
    *_SPEED,
    Quantity(
        "flops_per_token",
        "FLOP",
        "Operations of a training step per token, from the model's shape: 6 N + "
        "12 L d T, of N numbers in kernels and head, L layers, width d and sequences "
        "of T tokens.",
    ),
    Quantity(
        "peak_flops_per_second",
        "FLOP/s",
        "Peak of all devices for --compute-dtype; null where it is not known.",
    ),
    _measured("training_seconds", "s", "Time of all steps, measured like their speed."),
    _measured(
        "compile_seconds",
        "s",
        "Time of compiling the steps of training and validation, in the last process.",
    ),
    _measured(
        "compilations", "times", "Compilations of the step, in the last process."
    ),
    Quantity(
        "compactions",
        "",
        "What --compact did: step, and bytes of the optimizer's state before and "
        "after. They rise where columns come back, in fine-tuning alone.",
    ),
    Quantity(
        "best",
        "",
        "The best validation after the first step: its step and its numbers.",
    ),
    Quantity("changes", "", "Settings that a resumed run was given anew, and when."),
    _PEAK_MEMORY,
    Quantity(
        "memory_source",
        "",
        "Where peak_memory_bytes comes from: device, the allocator of the fullest "
        "device; or process, the resident memory of the whole process, on a CPU.",
    ),
    Quantity(
        "step_peak_bytes",
        "bytes",
        "Bytes at the peak of the compiled steps, by the compiler's plan; null where "
        "nothing was compiled.",
    ),
    Quantity(
        "optimizer_state_bytes",
        "bytes",
        "Bytes of the optimizer's state, each array counted once.",
    ),
    Quantity(
        "adamw_state_bytes", "bytes", "Bytes that AdamW's state of the model would be."
    ),
    Quantity(
        "block_state_bytes",
        "bytes",
        "Bytes of the state of the block matrices' method.",
    ),
    Quantity(
        "block_adamw_state_bytes",
        "bytes",
        "Bytes that AdamW's state of the block matrices would be.",
    ),
    Quantity(
        "memory",
        "bytes",
        "Bytes of parameters, gradients and state by kind, each array counted once.",
    ),
    Quantity("adamw_memory", "bytes", "The same with AdamW for all parameters."),
    Quantity(
        "bytes_per_device",
        "bytes",
        "What one device has of parameters, gradients and optimizer_state at the end; "
        "optimizer_state_in_host_memory: its share of what --state-memory moved there.",
    ),
    Quantity(
        "mean_ranks",
        "columns",
        "Rank of each projected matrix, averaged over the lines of metrics.jsonl.",
    ),
    *EFFECTIVE_RANKS,
    Quantity(
        "rejected_updates",
        "updates",
        "Updates left out because a gradient was not finite.",
    ),
    Quantity("data", "", "What was trained and validated on."),
    Quantity("device", "", "Number and kind of the devices."),
    Quantity("mesh", "", "Devices on data, fsdp and tensor."),
    Quantity("processes", "", "Processes that had the devices."),
    Quantity("versions", "", "Versions of Python and of the packages."),
)
# Of pre-training.
SUMMARY = (
    *IDENTITY,
    Quantity(
        "initial_validation_loss",
        "nats per token",
        "Validation loss before the first update.",
    ),
    *_VALIDATION,
    Quantity(
        "bytes_per_token", "bytes", "UTF-8 bytes of the validation text per token."
    ),
    *COSTS,
)


def markdown_table(quantities: Iterable[Quantity]) -> str:
    """Returns the rows of LINE or SUMMARY as a table of Markdown."""
    rows = [f"| `{q.name}` | {q.unit} | {q.meaning} |" for q in quantities]
    return "\n".join(["| name | unit | meaning |", "| --- | --- | --- |", *rows]) + "\n"
