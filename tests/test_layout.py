"""Who may import whom: one way through the library, its public names from outside."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_optax

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "lowrank_optax"

# A module may import those above it.
ORDER = [
    "alias",
    "coded",
    "rounding",
    "orthonormal",
    "matrices",
    "bases",
    "random_bases",
    "ranks",
    "budget",
    "refresh",
    "rebase",
    "moments",
    "plan",
    "sharding",
    "axes",
    "products",
    "uses",
    "traced",
    "subspace",
    "low_rank",
    "states",
    "low_bit",
    "projfactor",
    "channels",
    "accumulate",
    "subspace_grad",
    "capacity",
    "allocation",
    "memory",
    "inspection",
    "methods",
    "orthogonal",
    "relatives",
    "__init__",
]
RUNTIME_DEPENDENCIES = {"jax", "optax", "numpy"}


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yields (module, name or "", line) of every import in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.module or "", alias.name, node.lineno


def _internal_imports(path: Path) -> Iterator[tuple[str, int]]:
    for module, name, line in imports(path):
        package, _, submodule = module.partition(".")
        if package == "lowrank_optax":
            is_module = not submodule and (LIBRARY / f"{name}.py").exists()
            yield submodule or (name if is_module else "__init__"), line


def test_every_module_has_its_place_in_the_order():
    found = {
        ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
        for path in LIBRARY.rglob("*.py")
    }
    assert found == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_flow_one_way(module):
    above = ORDER[: ORDER.index(module)]
    for imported, line in _internal_imports(LIBRARY / f"{module}.py"):
        assert imported in above, f"{module}.py:{line} imports {imported}"


@pytest.mark.parametrize("module", ORDER)
def test_the_library_imports_jax_optax_numpy_and_the_standard_library_only(module):
    allowed = RUNTIME_DEPENDENCIES | set(sys.stdlib_module_names) | {"lowrank_optax"}
    for imported, _, line in imports(LIBRARY / f"{module}.py"):
        assert imported.partition(".")[0] in allowed, f"{module}.py:{line}: {imported}"


def _outside_files() -> list[Path]:
    found = [p for d in ("experiments", "benchmarks") for p in (ROOT / d).rglob("*.py")]
    assert found, "no file in experiments/ or benchmarks/"
    return sorted(found)


def test_experiments_and_benchmarks_use_public_names_only():
    problems = []
    for path in _outside_files():
        where = path.relative_to(ROOT)
        aliases = set()
        for module, name, line in imports(path):
            package, _, submodule = module.partition(".")
            if package != "lowrank_optax":
                continue
            if submodule or (name and name not in lowrank_optax.__all__):
                problems.append(f"{where}:{line}: {module} {name}".strip())
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {
                    a.asname or a.name for a in node.names if a.name == "lowrank_optax"
                }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr not in lowrank_optax.__all__
            ):
                problems.append(f"{where}:{node.lineno}: lowrank_optax.{node.attr}")
    assert not problems


def test_every_public_name_exists_and_is_listed_once_in_order():
    assert len(set(lowrank_optax.__all__)) == len(lowrank_optax.__all__)
    for name in lowrank_optax.__all__:
        assert hasattr(lowrank_optax, name)
