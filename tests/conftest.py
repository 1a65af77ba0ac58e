"""Settings that must stand before JAX starts, and fixtures for every test."""

import os
from pathlib import Path

import pytest

DEVICES = "--xla_force_host_platform_device_count"

# JAX reads these once. What the caller has set stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two programs in flight can starve each other of the threads that simulated devices
# meet in: XLA then ends the process.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
# OpenBLAS's threads take the cores from XLA's; experiments has the reason.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{DEVICES}=8"])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the repository; its tests are skipped without it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data directory ../shared/data, absent at {path}")
    return path


@pytest.fixture(scope="module")
def fast_compilation():
    """Compiles without most optimizations: these tests wait for little else."""
    import jax

    name = "jax_disable_most_optimizations"
    previous = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, previous)
