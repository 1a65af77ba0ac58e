"""Settings that must stand before JAX starts, and fixtures for every test."""

import gc
import importlib.metadata
import os
from pathlib import Path

import pytest

XLA_FLAGS = {"--xla_force_host_platform_device_count": "8"}
# Jaxlibs end the process over flags that they do not have.
jaxlib = importlib.metadata.version("jaxlib")
if jaxlib.startswith("0.10."):
    # The tests wait for little but compilation. With fast_compilation these emitters
    # of kernels take a third of the default ones' time; notebooks and doctests run the
    # default.
    XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
if jaxlib.startswith(("0.10.", "0.11.", "0.12.")):
    XLA_FLAGS["--xla_cpu_parallel_codegen_split_count"] = "1"

# JAX reads these once. What the caller has set stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two programs in flight can starve each other of the threads that simulated devices
# meet in: XLA then ends the process.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
# OpenBLAS's threads take the cores from XLA's; experiments has the reason.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
flags = os.environ.get("XLA_FLAGS", "").split()
given = {flag.partition("=")[0] for flag in flags}
flags += [f"{name}={XLA_FLAGS[name]}" for name in XLA_FLAGS if name not in given]
os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_finish():
    """Lets Python look for cycles a tenth as often as it would.

    Tracing makes many small objects, and each look at all of them takes a tenth of it.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Puts the longest test first: at the end the other workers would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Frees what a module compiled, some 70 maps of memory a test.

    Linux gives a process 65,530; XLA ends the process that asks for more.
    """
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the repository; its tests are skipped without it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data directory ../shared/data, absent at {path}")
    return path


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the site's HTML, notebooks not run; xdist's processes share one."""
    pytest.importorskip("sphinx", reason="the site needs the extra docs")
    from tests.site import built_site

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    return built_site(directory / "site")


@pytest.fixture(scope="module")
def fast_compilation():
    """Compiles without most optimizations: these tests wait for little else."""
    import jax

    name = "jax_disable_most_optimizations"
    previous = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, previous)


def pytest_make_parametrize_id(config, val, argname):
    """Names bytes by their argument: what gzip writes has the time in it.

    Processes that share the tests must collect the same names.
    """
    del config
    return argname if isinstance(val, bytes) else None
