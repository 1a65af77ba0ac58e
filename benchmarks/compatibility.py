"""Runs the library's tests on other versions of Python and jax, each freshly installed.

``python -m benchmarks.compatibility [oldest] [between] [newest] [--quick] [--save]``
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compatibility.json"
PACKAGES = ("jax", "optax", "flax", "chex", "orbax-checkpoint", "numpy")

# Only the library's own tests run. Experiments, clients and figures need more packages,
# and make test-slow runs the notebooks and the accelerator's units.
LEFT_OUT = (
    "tests/experiments",
    "tests/clients",
    "tests/test_site_in_browser.py",
    "tests/test_site.py",
    "tests/test_code_blocks.py",
    "tests/test_docs_figures.py",
    "tests/test_accelerator.py",
)
# Tests of code that depends on jax's tracing, sharding and saving. A new jax breaks
# these first.
QUICK = (
    "tests/test_value_and_grad.py",
    "tests/test_uses.py",
    "tests/test_loss_functions.py",
    "tests/test_sharding.py",
    "tests/test_shard_map.py",
    "tests/test_state_shardings.py",
    "tests/test_plan.py",
    "tests/test_boxes.py",
    "tests/test_frameworks.py",
    "tests/test_checkpointing.py",
    "tests/test_restore.py",
    "tests/test_optax_suite.py",
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment: requirements, and the newest versions of all other packages.

    Attributes:
        python: Version of Python, as in ``3.13``.
        requirements: Requirements for pip, beside the library and its tests.
        constraints: File beside ``pyproject.toml`` with a version for every package.
    """

    python: str
    requirements: tuple[str, ...] = ()
    constraints: str | None = None


def oldest() -> tuple[str, ...]:
    """Returns the oldest versions that ``pyproject.toml`` allows for the library."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return tuple(each.replace(">=", "==") for each in project["dependencies"])


ENVIRONMENTS = {
    "oldest": Environment("3.11", oldest()),
    "between": Environment("3.12", ("jax==0.11.*",)),
    "newest": Environment("3.13", constraints="constraints-newest.txt"),
}


def interpreter(version: str) -> str | None:
    """Returns a Python of this version, ``python3.13`` or a Python of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    of_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    for candidate in (f"python{version}", *map(str, of_pyenv)):
        try:
            # pyenv also has shims for versions that cannot run.
            subprocess.run(
                [candidate, "-c", "import ensurepip, venv"],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return None


def run(
    environment: Environment, quick: bool, unpinned: bool, processes: int
) -> dict[str, Any]:
    """Returns versions and counts of a run, or the reason why it did not run."""
    base = interpreter(environment.python)
    if base is None:
        reason = f"no python{environment.python} on PATH, and none of pyenv"
        print(f"{environment.python}: not run: {reason}")
        return {"python": environment.python, "not_run": reason, "missing": True}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([base, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        if environment.constraints and not unpinned:
            pip += ["-c", environment.constraints]
        pip += [*environment.requirements, "-e", ".[test]"]
        subprocess.run(pip, check=True, cwd=ROOT)
        return {**_versions(python), **_counts(python, Path(folder), quick, processes)}


def _versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys;"
        "print(json.dumps({'python': platform.python_version(),"
        "**{name: m.version(name) for name in sys.argv[1:]}}))"
    )
    command = [python, "-c", code, *PACKAGES]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def _counts(python: str, folder: Path, quick: bool, processes: int) -> dict[str, Any]:
    report = folder / "report.xml"
    # optax's own suite of tests is slow, and quick to fail on a new optax.
    chosen = QUICK if quick else ("tests", *(f"--ignore={x}" for x in LEFT_OUT))
    marked = "not slow or slow" if quick else "not slow"
    command = [python, "-m", "pytest", *chosen, "-m", marked, f"--junitxml={report}"]
    parallel = ["-n", str(processes), "--dist", "worksteal", "--durations=15"]
    code = subprocess.run([*command, *parallel], cwd=ROOT).returncode
    if not report.is_file():
        return {"not_run": f"pytest ended with {code} and no report"}
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    numbers = {name: int(suite.attrib[name]) for name in ("tests", "skipped")}
    failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "tests": "quick" if quick else "all",
        "passed": numbers["tests"] - numbers["skipped"] - len(failures),
        "failed": len(failures),
        "skipped": numbers["skipped"],
        "seconds": round(float(suite.attrib["time"])),
        "failures": failures,
    }


def passed(record: dict[str, Any]) -> bool:
    """Returns whether tests ran and none failed. Tests that did not run do not pass."""
    return record.get("passed", 0) > 0 and not record["failed"]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns a table of Python, jax and passed tests, as Markdown."""
    columns = ("python", *PACKAGES, "passed", "failed", "skipped", "seconds")
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for record in records:
        line = " | ".join(str(record.get(name, "")) for name in columns)
        reason = record.get("not_run")
        lines.append(f"{line} | NOT RUN: {reason}" if reason else line)
    return "\n".join(f"| {line} |" for line in lines)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def save(record: dict[str, Any]) -> None:
    """Replaces the record of the same environment and tests."""

    def what(run):
        return run["environment"], run.get("tests")

    runs = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else []
    runs = [*(run for run in runs if what(run) != what(record)), record]
    runs.sort(key=lambda run: list(ENVIRONMENTS).index(run["environment"]))
    RESULT.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make compatibility ARGS=...")
    parser.add_argument("environments", nargs="*", metavar="|".join(ENVIRONMENTS))
    parser.add_argument("--quick", action="store_true", help="what a new jax breaks")
    parser.add_argument("--unpinned", action="store_true", help="newest of everything")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--if-there", action="store_true", help="no failure where a Python is missing"
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    names = options.environments or list(ENVIRONMENTS)
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"no such environment: {', '.join(unknown)}")
    records = []
    for name in names:
        environment = ENVIRONMENTS[name]
        print(f"== {name}: Python {environment.python}", flush=True)
        records.append(
            {
                "environment": name,
                "date": datetime.date.today().isoformat(),
                "commit": _commit(),
                **run(environment, options.quick, options.unpinned, options.processes),
            }
        )
        if options.save:
            save(records[-1])
    print(table(records))
    if options.if_there:
        records = [record for record in records if not record.get("missing")]
    return 0 if all(map(passed, records)) else 1


if __name__ == "__main__":
    sys.exit(main())
