"""Which version this is, and which others it is tested with."""

import importlib.metadata
import runpy
import tomllib
from pathlib import Path

import pytest

import lowrank_optax
from benchmarks import compatibility

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_is_that_of_the_project():
    assert lowrank_optax.__version__ == PROJECT["version"]


def test_the_version_of_a_tree_that_is_not_installed_says_so(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    module = runpy.run_path(lowrank_optax.__file__)
    assert module["__version__"] == "0+uninstalled"


def test_the_versions_of_python_that_are_listed_are_those_that_are_tested():
    listed = {
        name.rpartition(" ")[2]
        for name in PROJECT["classifiers"]
        if name.startswith("Programming Language :: Python :: 3.")
    }
    assert listed == {each.python for each in compatibility.ENVIRONMENTS.values()}


def test_the_oldest_environment_has_the_oldest_versions_that_are_allowed():
    oldest = compatibility.ENVIRONMENTS["oldest"]
    assert f">={oldest.python}" == PROJECT["requires-python"]
    for allowed, installed in zip(
        PROJECT["dependencies"], oldest.requirements, strict=True
    ):
        assert allowed.replace(">=", "==") == installed


def test_what_was_not_run_has_not_passed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    environment = compatibility.ENVIRONMENTS["newest"]
    record = compatibility.run(environment, True, False, processes=1)
    assert not compatibility.passed(record)
    assert "NOT RUN: no python3.13 on PATH" in compatibility.table([record])


@pytest.mark.parametrize("path", compatibility.QUICK)
def test_what_ci_runs_on_the_newest_versions_is_there(path):
    assert (ROOT / path).is_file()
