"""The table client x method: ``python -m tests.clients [--json FILE] [CLIENT ...]``.

Each client has a process of its own: some change settings of their frameworks for all.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from tests.clients.clients import CLIENTS
from tests.clients.protocol import METHODS

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("lists_right", "trains", "saves", "restores", "sharded")
PACKAGES = (
    *("jax", "optax", "flax", "equinox", "dm-haiku", "haliax", "levanter"),
    *("google-tunix", "keras", "orbax-checkpoint"),
)


def outcomes(name: str) -> dict[tuple[str, str], str]:
    """Returns (method, column) -> what came of it, of one client."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ROOT / "tests/clients/test_clients.py"
        command = [sys.executable, "-m", "pytest", tests, "-k", f"{name}-", "-q"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)
        if not report.exists():
            return {}
        cases = ElementTree.parse(report).iter("testcase")
        return {_place(case.get("name", "")): _outcome(case) for case in cases}


def _place(test: str) -> tuple[str, str]:
    column, _, cell = test.removesuffix("]").partition("[")
    return cell.rpartition("-")[2], column.removeprefix("test_")


def _outcome(case: ElementTree.Element) -> str:
    for kind, word in {"failure": "failed", "error": "failed", "skipped": ""}.items():
        found = case.find(kind)
        if found is not None:
            message = (found.get("message") or "").split("\n")[0]
            return f"{word or 'skipped'}: {message}".replace(str(ROOT), ".")
    return "passed"


def versions() -> dict[str, str]:
    """Returns the versions of what is installed of the clients."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Runs the clients, prints their table; returns whether something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", default=list(CLIENTS))
    parser.add_argument("--json", type=Path, help="file for the table")
    arguments = parser.parse_args()
    if unknown := {*arguments.clients} - {*CLIENTS}:
        parser.error(f"no such client: {', '.join(unknown)}; there are {[*CLIENTS]}")
    # XLA's threads and those of OpenBLAS take each other's cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    table, start = {}, time.monotonic()
    for name in arguments.clients:
        found = outcomes(name)
        table[name] = {
            method: {
                column: found.get((method, column), "failed: did not run")
                for column in COLUMNS
            }
            for method in METHODS
        }
    cells = [
        x for rows in table.values() for row in rows.values() for x in row.values()
    ]
    counts = {
        word: sum(cell.startswith(word) for cell in cells)
        for word in ("passed", "failed", "skipped")
    }
    print(f"{'client':14}{'method':15}" + "".join(f"{x:13}" for x in COLUMNS))
    for name, rows in table.items():
        for method, row in rows.items():
            words = "".join(f"{cell.partition(':')[0]:13}" for cell in row.values())
            print(f"{name:14}{method:15}{words}")
    for reason in sorted({x for x in cells if x != "passed"}):
        print(reason)
    words = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(f"{words} in {time.monotonic() - start:.0f} s")
    if arguments.json:
        content = {
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": versions(),
            "counts": counts,
            "table": table,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
