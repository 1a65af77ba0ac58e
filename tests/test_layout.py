"""Who may import whom: one way through the library, its public names from outside.

Nothing is long, and nothing public is missing.
"""

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
    "checks",
    "kinds",
    "equations",
    "matrix.__init__",
    "matrix.arrays",
    "matrix.boxes",
    "matrix.dimension_numbers",
    "matrix.names",
    "matrix.stacks",
    "matrix.inference",
    "matrix.roles",
    "matrix.view",
    "matrix.plan",
    "matrix.sharding",
    "matrix.shares",
    "rules.__init__",
    "rules.hashing",
    "codes",
    "projected",
    "rules.lapack",
    "rules.orthonormal",
    "rules.products",
    "rules.bases",
    "rules.dct_columns",
    "rules.power_iteration",
    "rules.random_bases",
    "rules.ranks",
    "rules.budget",
    "rules.schedules",
    "rules.rebase",
    "rules.newton_schulz",
    "rules.residual",
    "rules.residual_signs",
    "rules.residual_scaled",
    "rules.residual_orthogonalized",
    "parts",
    "subspace",
    "sketch",
    "core",
    "binding.__init__",
    "binding.moments",
    "binding.states",
    "binding.numbers",
    "binding.optimizer",
    "initial",
    "due",
    "fitting",
    "renewal",
    "transform",
    "neurons",
    "methods.__init__",
    "methods.optimizer",
    "methods.galore",
    "methods.adarankgrad",
    "methods.vlorp",
    "methods.projfactor",
    "methods.sumo",
    "methods.low_rank_muon",
    "methods.ldadam",
    "methods.fira",
    "methods.apollo",
    "gradients.__init__",
    "gradients.layout",
    "gradients.followed",
    "gradients.moves",
    "gradients.contraction",
    "gradients.routes",
    "gradients.full_size",
    "gradients.linear",
    "gradients.pieces",
    "gradients.lookups",
    "gradients.product",
    "gradients.ragged",
    "gradients.uses",
    "gradients.program",
    "gradients.traced",
    "gradients.leaves",
    "gradients.evaluation",
    "gradients.variants",
    "gradients.value_and_grad",
    "training.__init__",
    "training.finite",
    "training.window",
    "training.by_role",
    "training.accumulate",
    "training.renewals",
    "training.register",
    "training.host_memory",
    "training.modules",
    "training.shapes",
    "training.placed",
    "training.step",
    "training.programs",
    "training.train_step",
    "storage.__init__",
    "storage.rounding",
    "storage.coded_arrays",
    "storage.formats",
    "storage.low_bit",
    "storage.resize",
    "storage.allocation",
    "storage.restore",
    "report.__init__",
    "report.ranks",
    "report.projections",
    "report.state_shardings",
    "report.memory",
    "report.memory_plan",
    "adapter",
    "__init__",
]
ROOMS = {
    "binding",
    "gradients",
    "matrix",
    "methods",
    "report",
    "rules",
    "storage",
    "training",
}
MOST_LINES = 300
# Module -> why it may have more.
LONG: dict[str, str] = {}
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


def _file(module: str) -> Path:
    return LIBRARY.joinpath(*module.split(".")).with_suffix(".py")


def _modules() -> set[str]:
    found = (path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    return {".".join(path.with_suffix("").parts) for path in found}


def _internal_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (dotted name under the library, line) of the modules that a file loads."""
    for module, name, line in imports(path):
        package, _, inside = module.partition(".")
        if package != "lowrank_optax":
            continue
        # The longest name that is a module; a room, and the library, is its __init__.
        names = [part for part in (inside, name) if part]
        for end in range(len(names), -1, -1):
            dotted = ".".join(names[:end])
            package_file = f"{dotted}.__init__" if dotted else "__init__"
            if dotted and _file(dotted).is_file():
                yield dotted, line
                break
            if _file(package_file).is_file():
                yield package_file, line
                break


def test_every_module_has_its_place_in_the_order():
    assert len(set(ORDER)) == len(ORDER)
    assert _modules() == set(ORDER)


def test_every_room_is_known_and_has_a_line_that_says_what_it_is_for():
    rooms = {path.parent.name for path in LIBRARY.rglob("*/__init__.py")}
    assert rooms == ROOMS
    for room in ROOMS:
        tree = ast.parse(_file(f"{room}.__init__").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), room
        # A room gives nothing away: what it has is imported from where it is.
        assert len(tree.body) == 1, room


@pytest.mark.parametrize("module", ORDER)
def test_imports_flow_one_way(module):
    above = ORDER[: ORDER.index(module)]
    for imported, line in _internal_imports(_file(module)):
        assert imported in above, f"{module}:{line} imports {imported}"


def test_the_imports_of_a_file_are_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import lowrank_optax\n"
        "from lowrank_optax import rules, galore\n"
        "from lowrank_optax.rules import hashing\n"
        "def later():\n"
        "    from lowrank_optax.rules.hashing import hashed\n"
        "    import lowrank_optax.binding.states\n"
        "    import jax\n"
    )
    assert list(_internal_imports(file)) == [
        ("__init__", 1),
        ("rules.__init__", 2),
        ("__init__", 2),
        ("rules.hashing", 3),
        ("rules.hashing", 5),
        ("binding.states", 6),
    ]


@pytest.mark.parametrize("module", ORDER)
def test_no_file_is_long_without_a_reason(module):
    lines = len(_file(module).read_text(encoding="utf-8").splitlines())
    # A reason that is needed no more goes.
    assert (lines > MOST_LINES) == (module in LONG), f"{module}: {lines} lines"


@pytest.mark.parametrize("module", ORDER)
def test_the_library_imports_jax_optax_numpy_and_the_standard_library_only(module):
    allowed = RUNTIME_DEPENDENCIES | set(sys.stdlib_module_names) | {"lowrank_optax"}
    for imported, _, line in imports(_file(module)):
        assert imported.partition(".")[0] in allowed, f"{module}:{line}: {imported}"


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


def test_what_is_imported_at_the_top_is_public():
    tree = ast.parse(_file("__init__").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(lowrank_optax.__all__)


def test_every_method_has_the_transformation_that_it_is_made_of():
    """An optimizer by name, and ``scale_by_`` the same without the learning rate."""
    modules = {m.partition(".")[2] for m in ORDER if m.startswith("methods.")}
    for name in modules - {"__init__", "optimizer"}:
        assert {name, f"scale_by_{name}"} <= set(lowrank_optax.__all__)


def test_a_benchmark_that_says_it_has_no_flags_has_none():
    """The other parser would never see them."""
    found = 0
    for path in (ROOT / "benchmarks").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "parse_no_flags(" in text and path.name != "harness.py":
            found += 1
            assert "ArgumentParser(" not in text, path
            assert "arguments_of(" not in text, path
    assert found
