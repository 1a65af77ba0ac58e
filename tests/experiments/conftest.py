"""Fixtures for the tests that run the whole command."""

import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.run.terminal import TrainingProgress
from tests.experiments.small_runs import write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, fast_compilation):
    """The flags of a run of 4 steps; equal programs are compiled once per session."""
    del fast_compilation
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
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
    monkeypatch.setattr(jax, "local_devices", lambda: device)


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal when it has started a step."""

    def arrange(step, number=signal.SIGTERM):
        def advance(self, now):
            if now == step:
                signal.raise_signal(number)

        monkeypatch.setattr(TrainingProgress, "advance", advance)

    return arrange
