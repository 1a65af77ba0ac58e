"""Values by hand: each is the quotient of the definition."""

import numpy as np
import pytest

from experiments.tasks.metrics import score
from experiments.tasks.table import TASKS

# Of class 1: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], np.int32)
PREDICTIONS = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], np.int32)


def one(name, predictions, labels):
    return score([name], np.asarray(predictions), np.asarray(labels))[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 7 / 10),
        ("f1", 2 * 3 / (2 * 3 + 1 + 2)),
        # Class 0 has 4 true positives, 2 false positives, 1 false negative.
        ("macro_f1", (6 / 9 + 8 / 11) / 2),
        ("matthews", (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6)),
    ],
)
def test_metrics_of_two_classes(name, value):
    assert one(name, PREDICTIONS, LABELS) == pytest.approx(value, rel=1e-12)


def test_macro_f1_counts_a_class_that_is_only_predicted():
    # Class 0: 2/3, class 1: 2/3, class 2: 0.
    assert one("macro_f1", [0, 2, 1, 1], [0, 0, 1, 2]) == pytest.approx((4 / 3) / 3)


def test_matthews_of_three_classes():
    # Gorodkin: 4 of 6 right; 2, 2, 2 labels; 3, 2, 1 predictions.
    value = (4 * 6 - 2 * 6) / np.sqrt((36 - 14) * (36 - 12))
    assert one("matthews", [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]) == pytest.approx(
        value
    )


def test_correlations_of_numbers():
    labels, predictions = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 8.0]
    # Deviations (-1.5, -.5, .5, 1.5) and (-4.5, -1.5, 3.5, 2.5): 13 / sqrt(5 * 41).
    assert one("pearson", predictions, labels) == pytest.approx(13 / np.sqrt(205))
    # Ranks 1 2 4 3: 1 - 6 * 2 / (4 * 15).
    assert one("spearman", predictions, labels) == pytest.approx(0.8)
    # Ties have their mean rank, 1.5: 4.5 / sqrt(5 * 4.5).
    assert one("spearman", [1.0, 1.0, 2.0, 3.0], labels) == pytest.approx(
        4.5 / np.sqrt(22.5)
    )


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_give_0_without_a_warning(name, constant):
    predictions = np.full(10, constant)
    # F1 of always class 1 is 2 * 5 / (2 * 5 + 5).
    value = 2 / 3 if name == "f1" and constant else 0.0
    assert one(name, predictions, LABELS) == pytest.approx(value, abs=0)


def test_constant_predictions_and_labels_give_0_or_all():
    ones = np.ones(3)
    values = score(["pearson", "spearman", "matthews", "accuracy"], ones, ones)
    assert values == {"pearson": 0, "spearman": 0, "matthews": 0, "accuracy": 1}


@pytest.mark.parametrize("name", ["f1", "macro_f1", "matthews", "accuracy"])
def test_one_example_has_every_metric(name):
    assert one(name, [1], [0]) == 0


def test_f1_of_a_class_that_is_nowhere_is_0():
    assert one("f1", [0, 0], [0, 0]) == 0


def test_nearly_constant_predictions_have_a_correlation_without_a_warning():
    # Neighbours in float32, which a model computes in.
    predictions = np.float32(1) + np.array([0, 0, 1, 1], np.float32) * 2.0**-23
    assert one("pearson", predictions, predictions) == pytest.approx(1)


def test_a_prediction_that_is_not_finite_has_no_correlation():
    for bad in (np.nan, np.inf):
        assert np.isnan(one("pearson", [1.0, bad, 2.0], [1.0, 2.0, 3.0]))


def test_every_task_of_an_encoder_has_metrics_that_exist():
    classes, numbers = np.array([0, 1]), np.array([0.5, 1.0])
    for task in TASKS.values():
        if task.kind != "answer":
            values = classes if task.kind == "classes" else numbers
            for name, value in score(task.metrics, values, values).items():
                assert value == pytest.approx(1), name
