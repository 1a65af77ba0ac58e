"""The rooms of the experiments: who may import whom, and how long a file may be."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
MOST_LINES = 300

# Room -> rooms that it may import, beside itself; a file at the top is its own room.
BELOW = {
    "__init__": set(),
    "errors": set(),
    "extras": {"errors"},
    "ranges": set(),
    "arguments": {"errors", "ranges"},
    "data": {"errors", "extras"},
    "model": {"errors", "data"},
    "distribution": {"errors", "model"},
    "tasks": {"errors", "extras", "ranges", "data", "model"},
    "optim": {"errors", "ranges", "model"},
    "run": {
        *("errors", "ranges", "arguments", "data", "model", "distribution", "optim"),
        "extras",
    },
    "tuning": {
        *("errors", "ranges", "arguments", "data", "model", "tasks", "optim", "run"),
        "distribution",
    },
    "comparison": {
        *("errors", "ranges", "arguments", "data", "model", "tasks", "optim", "run"),
        "tuning",
    },
    "__main__": set(),
    # The commands, none of which imports another.
    "pretrain_llama": {"model", "run"},
    "finetune": {"run", "tuning"},
    "generate": {"errors", "ranges", "arguments", "model", "run"},
    "evaluate": {
        *("errors", "ranges", "arguments", "data", "model", "distribution", "run"),
    },
    "export": {"arguments", "model", "run"},
    "plan_memory": {"errors", "ranges", "arguments", "data", "optim", "run"},
    "launch": {"errors", "ranges", "arguments", "distribution"},
    "compare": {"errors", "arguments", "comparison"},
}
FILES = sorted(EXPERIMENTS.rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _room(module: str) -> str:
    return module.split(".")[1]


def _imported(path: Path) -> Iterator[str]:
    """Yields the modules of the experiments that a file imports, at any depth."""
    modules = set(map(_name, FILES))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # A name may be a module itself.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [x if x in modules else node.module or "" for x in names]
        else:
            continue
        for module in found:
            if module.partition(".")[0] == "experiments":
                assert module in modules, f"{path}:{node.lineno} imports {module}"
                yield module


def test_every_file_is_in_a_room():
    assert {_room(_name(path)) for path in FILES} == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_those_below_it_only(room):
    for path in FILES:
        if _room(_name(path)) == room:
            rooms = set(map(_room, _imported(path)))
            assert rooms - {room} <= BELOW[room], path


def test_rooms_and_files_have_an_order():
    graphlib.TopologicalSorter(BELOW).prepare()
    graph = {_name(path): set(_imported(path)) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_file_is_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES
