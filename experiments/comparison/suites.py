"""The suites of ``experiments.compare``, by name."""

from experiments.comparison.ablation_suites import ABLATION_SUITES
from experiments.comparison.pretraining_suites import PRETRAINING_SUITES
from experiments.comparison.suite import Contender, Suite
from experiments.comparison.tuning_suites import TUNING_SUITES

__all__ = ["SUITES", "Contender", "Suite"]

SUITES: dict[str, Suite] = {
    **PRETRAINING_SUITES,
    **ABLATION_SUITES,
    **TUNING_SUITES,
}
