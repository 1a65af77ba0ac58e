"""Wheel and sdist: what is in them, an empty environment with one, its types.

The environment is made by pip, which fetches jax and optax: all of it is slow.
"""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import lowrank_optax

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow

STEP = """
import jax
import jax.numpy as jnp
import optax
import lowrank_optax

def loss(params):
    return jnp.mean((jnp.tanh(params["embed"] @ params["up"]) - 1) ** 2)

params = {"embed": jnp.eye(64, 16), "up": jnp.ones((16, 32)) / 16}
optimizer = lowrank_optax.by_role(lowrank_optax.low_rank_muon(0.01, rank=4), 0.1)
state = optimizer.init(params)

@jax.jit
def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

losses = []
for _ in range(3):
    params, state, value = step(params, state)
    losses.append(float(value))
assert losses[2] < losses[1] < losses[0], losses
print(lowrank_optax.__version__, lowrank_optax.__file__)
"""

# Each line is right; the last two are wrong, and a checker that sees no types of the
# library lets them pass.
CONSUMER = """
import optax
import lowrank_optax

optimizer: optax.GradientTransformation = lowrank_optax.galore(1e-2, rank=4)
both: optax.GradientTransformation = lowrank_optax.by_role(optimizer, 1e-2)
chained = optax.chain(optax.clip_by_global_norm(1.0), lowrank_optax.low_bit(both, 8))
rows: dict[str, object] = dict(lowrank_optax.ranks(None))
lowrank_optax.galore(1e-2, rank=4, side="left")
lowrank_optax.by_role(optimizer, 1e-2, patterns={"head": "heads"})
"""
WRONG_LINES = [9, 10]


class Installed(NamedTuple):
    wheel: Path
    sdist: Path
    python: Path


def _run(*command, cwd):
    # Of a checkout on PYTHONPATH nothing is to be seen.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def _checked(*command, cwd):
    done = _run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The wheel, which is made from the sdist, in an environment of its own."""
    folder = tmp_path_factory.mktemp("packaging")
    _checked(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    _checked(sys.executable, "-m", "venv", folder / "environment", cwd=folder)
    python = folder / "environment/bin/python"
    install = (python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    _checked(*install, "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return Installed(wheel, sdist, python)


def test_the_wheel_has_the_library_alone(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    outside = {name.split("/")[0] for name in names}
    version = PROJECT["version"]
    assert outside == {"lowrank_optax", f"lowrank_optax-{version}.dist-info"}
    modules = {str(x.relative_to(ROOT)) for x in (ROOT / "lowrank_optax").rglob("*.py")}
    assert modules | {"lowrank_optax/py.typed"} <= set(names)
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(installed.wheel).read(metadata).decode()
    assert "Description-Content-Type: text/markdown" in text
    for label in PROJECT["urls"]:
        assert f"Project-URL: {label}, " in text


def test_the_sdist_has_what_builds_and_tests_it(installed):
    with tarfile.open(installed.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"]
    assert {*wanted, "lowrank_optax/py.typed", "tests/test_packaging.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "docs/_b"))]


def test_it_asks_for_jax_and_optax_alone(installed):
    listed = _checked(
        installed.python, "-m", "pip", "list", "--format=freeze", cwd=ROOT.parent
    )
    found = {line.split("==")[0].lower() for line in listed.split()}
    assert {"jax", "optax", "lowrank_optax"} <= found
    assert not found & {"flax", "chex", "orbax-checkpoint", "tyro", "pytest"}


def test_a_step_is_trained_in_an_empty_environment(installed):
    # -I: neither the current directory nor PYTHONPATH is looked at.
    command = (installed.python, "-I", "-W", "error", "-c", STEP)
    version, file = _checked(*command, cwd=ROOT.parent).split()
    assert version == PROJECT["version"]
    assert Path(file).is_relative_to(installed.python.parent.parent)
    assert version == lowrank_optax.__version__


CHECKERS = {
    "pyright": ("pyright", "--pythonpath"),
    # optax has no py.typed.
    "mypy": ("mypy", "--ignore-missing-imports", "--python-executable"),
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_checker_sees_the_librarys_types(installed, checker, tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = (sys.executable, "-m", *CHECKERS[checker], installed.python)
    done = _run(*command, "consumer.py", cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if "error" in line]
    lines = [int(x.split("consumer.py:")[1].split(":")[0]) for x in found[:-1]]
    assert sorted(set(lines)) == WRONG_LINES, done.stdout + done.stderr
