"""The tasks by name: columns, labels and metrics, as GLUE's data sets have them."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """A kind of examples, and how answers to them are judged.

    Attributes:
        kind: "classes": one label of a fixed set; "number": a real number; "answer": a
            text that a decoder writes or chooses.
        text_columns: Columns of the input by default: one text, or a pair. The
            answer's instructions where ``kind`` is "answer".
        metrics: Names of :func:`experiments.tasks.metrics.score`, or of "answer" tasks
            their own; the first is the primary one; for all of them higher is better.
        label_column: Column of the label, or of the answer, by default.
        label_names: Of the classes, in the order of their numbers; empty: those found
            in the training rows, or no classes.
        range: The smallest and the largest number; None: any.
        splits: Of the validation rows: one name a file, or a split on the hub behind
            ``validation_``.
        is_text: False: the input column has sequences of integers.
    """

    kind: Literal["classes", "number", "answer"]
    text_columns: tuple[str, ...]
    metrics: tuple[str, ...]
    label_column: str = "label"
    label_names: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    splits: tuple[str, ...] = ("validation",)
    is_text: bool = True


_ENTAILS = ("entailment", "not_entailment")
_ACCURACY = ("accuracy",)
_F1 = ("f1", "accuracy")
_CORRELATIONS = ("pearson", "spearman")
_MACRO = ("accuracy", "macro_f1")
_SENTENCES = ("sentence1", "sentence2")

# Columns, label names and their numbers are those of nyu-mll/glue on the Hugging Face
# hub, the metrics those of Wang et al. 2019, "GLUE", Table 1.
TASKS = {
    "cola": TaskKind(
        "classes",
        ("sentence",),
        ("matthews",),
        label_names=("unacceptable", "acceptable"),
    ),
    "mrpc": TaskKind(
        "classes", _SENTENCES, _F1, label_names=("not_equivalent", "equivalent")
    ),
    "rte": TaskKind("classes", _SENTENCES, _ACCURACY, label_names=_ENTAILS),
    "sst2": TaskKind(
        "classes", ("sentence",), _ACCURACY, label_names=("negative", "positive")
    ),
    "stsb": TaskKind("number", _SENTENCES, _CORRELATIONS, range=(0.0, 5.0)),
    "mnli": TaskKind(
        "classes",
        ("premise", "hypothesis"),
        _ACCURACY,
        label_names=("entailment", "neutral", "contradiction"),
        splits=("matched", "mismatched"),
    ),
    "qnli": TaskKind(
        "classes", ("question", "sentence"), _ACCURACY, label_names=_ENTAILS
    ),
    "qqp": TaskKind(
        "classes",
        ("question1", "question2"),
        _F1,
        label_names=("not_duplicate", "duplicate"),
    ),
    "classification": TaskKind("classes", ("text",), _MACRO),
    "regression": TaskKind("number", ("text",), _CORRELATIONS),
    # Geneformer's cells, and whatever else comes with ids of its own.
    "tokens": TaskKind("classes", ("input_ids",), _MACRO, is_text=False),
    "gsm8k": TaskKind(
        "answer", ("question",), ("exact_match", "flexible_match"), "answer"
    ),
    "commonsense": TaskKind(
        "answer", ("instruction",), ("named_acc", "acc", "acc_norm"), "output"
    ),
    "completion": TaskKind(
        "answer", ("prompt",), ("token_accuracy", "exact_match"), "completion"
    ),
}
