"""optax's own tests of optimizers, as installed, with ours as the rows of its tables.

Its tables are read when its test classes are defined, so each module is executed up to
its class, the table replaced by one row of ours, and the class defined from there.
"""

import ast
import importlib.util
import os
import types
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import optax
import pytest

import lowrank_optax

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]

# Rank 1 projects the 2x2 matrices and the (2, 5, 2) stack of these tests; 128, the
# default, leaves all of them at full size.
CONTRIB_ROWS = {
    "adarankgrad-rank-1": ("adarankgrad", {"learning_rate": 1e-2, "rank": 1}),
    "adarankgrad": ("adarankgrad", {"learning_rate": 1e-2}),
    "galore-rank-1": ("galore", {"learning_rate": 1e-2, "rank": 1}),
    "galore": ("galore", {"learning_rate": 1e-2}),
    "vlorp-rank-1": ("vlorp", {"learning_rate": 1e-2, "rank": 1}),
    "projfactor-rank-1": ("projfactor", {"learning_rate": 1e-2, "rank": 1}),
}


def _without_granularity(method):
    """Returns a method of granularity 1 with the arguments that optax's tests inject.

    They know by name that a rank cannot be traced; of a granularity they do not.
    """

    def build(learning_rate: optax.ScalarOrSchedule, rank=8, seed=0):
        return method(learning_rate, rank, 1, seed=seed)

    return build


METHODS = types.SimpleNamespace(
    adarankgrad=lowrank_optax.adarankgrad,
    galore=lowrank_optax.galore,
    vlorp=_without_granularity(lowrank_optax.vlorp),
    projfactor=_without_granularity(lowrank_optax.projfactor),
)
# 2 wrap x extra args, 4 targets, hyperparameters, 2 + 2 + 4 dtypes, and the schedule:
# optax 0.2.8. A newer optax may have more.
CONTRIB_CASES = 16

# The parameter is (2, 8, 4), sharded over the rows.
SHARDING_ROWS = {
    "adarankgrad_rank_2": lambda: lowrank_optax.adarankgrad(1.0, rank=2),
    "adarankgrad": lambda: lowrank_optax.adarankgrad(1.0),
    "galore_rank_2": lambda: lowrank_optax.galore(1.0, rank=2),
    "galore": lambda: lowrank_optax.galore(1.0),
    "vlorp_fine": lambda: lowrank_optax.vlorp(1.0, rank=1, granularity=2),
    "projfactor_fine": lambda: lowrank_optax.projfactor(1.0, rank=1, granularity=2),
}
SHARDING_CASES = 3


def _test_class(module_name: str, class_name: str, rows: dict[str, Any]) -> type:
    """Returns the class of optax's module, defined after ``rows`` replaced its names.

    Args:
        module_name: Module, which is not imported.
        class_name: Its test class.
        rows: Global name -> value: tables, or what they are looked up in.
    """
    spec = importlib.util.find_spec(module_name)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    names = [getattr(node, "name", None) for node in tree.body]
    cut = names.index(class_name)
    module = types.ModuleType(module_name)
    _execute(tree.body[:cut], spec.origin, module)
    missing = [name for name in rows if not hasattr(module, name)]
    assert not missing, f"{module_name} has no {missing} any more"
    vars(module).update(rows)
    _execute(tree.body[cut : cut + 1], spec.origin, module)
    return getattr(module, class_name)


def _execute(statements: list[ast.stmt], path: str, module: types.ModuleType) -> None:
    code = compile(ast.Module(statements, type_ignores=[]), path, "exec")
    # sharding_test sets XLA_FLAGS, which are read long since, and warns of a row.
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, vars(module))


def _run(test_class: type, name: str = "") -> unittest.TestResult:
    """Runs the cases whose method has ``name`` in its name."""
    loader = unittest.TestLoader()
    methods = [x for x in loader.getTestCaseNames(test_class) if name in x]
    result = unittest.TestResult()
    unittest.TestSuite(test_class(method) for method in methods).run(result)
    return result


def _assert_passed(result: unittest.TestResult, cases: int) -> None:
    problems = [*result.failures, *result.errors, *result.skipped]
    assert not problems, "\n\n".join(f"{case}\n{text}" for case, text in problems)
    assert result.testsRun >= cases


@pytest.mark.parametrize("row", CONTRIB_ROWS)
def test_the_suite_for_contributed_optimizers_passes(row):
    name, arguments = CONTRIB_ROWS[row]
    table = (
        {
            "opt_name": name,
            "opt_kwargs": arguments,
            "wrapper_name": None,
            "wrapper_kwargs": None,
        },
    )
    test_class = _test_class(
        "optax.contrib._common_test",
        "ContribTest",
        {
            "_MAIN_OPTIMIZERS_UNDER_TEST": table,
            "_ALL_OPTIMIZERS_UNDER_TEST": table,
            "contrib": METHODS,
        },
    )
    _assert_passed(_run(test_class), CONTRIB_CASES)


@pytest.mark.parametrize("row", SHARDING_ROWS)
def test_the_sharding_suite_passes(row):
    test_class = _test_class(
        "optax._src.sharding_test",
        "ShardingTest",
        {"OPTIMIZERS": {row: SHARDING_ROWS[row]()}},
    )
    # optax 0.2.8 compares versions as strings, and so takes jax 0.10 for older than
    # 0.7.2 and skips.
    with mock.patch.object(jax, "__version__", "9"):
        result = _run(test_class, row)
    _assert_passed(result, SHARDING_CASES)
