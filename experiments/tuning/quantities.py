"""What a fine-tuning run writes down, beside :mod:`experiments.run.quantities`."""

from experiments.run.quantities import COSTS, IDENTITY, STEP, Quantity

_VALIDATION = (
    Quantity(
        "validation_loss",
        "nats",
        "Loss on the validation examples: of a class its cross entropy, of a number "
        "the squared error, of an answer the cross entropy per token.",
    ),
    Quantity("validation_metric", "", "The task's primary metric; higher is better."),
    Quantity(
        "validation_metrics",
        "",
        "All metrics of the task by name; of several splits, behind the split's name.",
    ),
)

# Of a line of metrics.jsonl.
LINE = (*STEP, *_VALIDATION)

# Of summary.json.
SUMMARY = (
    Quantity("task", "", "Name of the task."),
    *IDENTITY,
    Quantity("metric", "", "Name of the primary metric."),
    Quantity("initial_metric", "", "The primary metric before the first update."),
    Quantity("last_metric", "", "That of the last validation."),
    Quantity("best_metric", "", "That of the best validation after the first update."),
    Quantity("best_step", "updates", "The step of the best validation."),
    Quantity("last_metrics", "", "All metrics of the last validation."),
    Quantity("validation_loss", "nats", "Loss of the last validation."),
    Quantity(
        "bucket_lengths", "tokens", "Lengths that batches are padded to: one of these."
    ),
    *COSTS,
    Quantity(
        "adapter",
        "",
        "Of --save-adapter: rank and relative error of each matrix, bytes, what "
        "changed and is left out, and the metrics of the model with the adapter alone.",
    ),
)
