"""How good predictions are, as GLUE and the papers judge them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments.extras import import_extra


def score(
    metric_names: Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    r"""Compares predictions with labels.

    ============ ======================================================= ===========
    name         value                                                   range
    ============ ======================================================= ===========
    ``accuracy`` share of equal classes                                  [0, 1]
    ``f1``       harmonic mean of precision and recall of class 1        [0, 1]
    ``macro_f1`` the same of each class of labels or predictions, mean   [0, 1]
    ``matthews`` correlation of classes (Matthews; Gorodkin for many)    [-1, 1]
    ``pearson``  correlation of numbers                                  [-1, 1]
    ``spearman`` correlation of their ranks, ties at their mean          [-1, 1]
    ============ ======================================================= ===========

    Where a quotient is 0 / 0 the value is 0: a correlation where the predictions or the
    labels are all equal, F1 without a true or predicted example of the class.

    Args:
        metric_names: Of those above.
        predictions: (n,), n >= 1; classes, integers, or numbers.
        labels: (n,), the same.

    Returns:
        A value by name, higher is better; NaN for a correlation with a prediction that
        is not finite.

    Example:
        >>> score(("f1", "accuracy"), np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
        {'f1': 0.8, 'accuracy': 0.75}
    """
    return {name: _METRICS[name](predictions, labels) for name in metric_names}


def import_metrics() -> Any:
    """Returns the library of metrics, which only fine-tuning needs.

    Raises:
        UserError: If it is not installed.
    """
    needs = "the metrics of --task need scikit-learn"
    return import_extra("sklearn.metrics", needs, "finetune", "run make finetune")


def _f1(average):
    def f1(predictions, labels):
        # 0 for 0 / 0; the annotation of the library has "warn" alone.
        options: Any = {"average": average, "zero_division": 0.0}
        return float(import_metrics().f1_score(labels, predictions, **options))

    return f1


def _matthews(predictions, labels):
    if _is_constant(predictions) or _is_constant(labels):
        return 0.0
    return float(import_metrics().matthews_corrcoef(labels, predictions))


def _correlation(function):
    def correlation(predictions, labels):
        predictions = np.asarray(predictions, np.float64)
        if not np.all(np.isfinite(predictions)):
            return float("nan")
        if _is_constant(predictions) or _is_constant(labels):
            return 0.0
        return float(function(predictions, np.asarray(labels, np.float64))[0])

    return correlation


def _is_constant(values):
    return bool(np.all(values == values[0]))


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float(np.mean(predictions == labels)),
    "f1": _f1("binary"),
    "macro_f1": _f1("macro"),
    "matthews": _matthews,
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}
