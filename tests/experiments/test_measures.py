"""Speed, MFU, perplexity and memory: what a run measures of itself."""

import types

import jax
import numpy as np
import pytest

from experiments.distribution.agreement import versions
from experiments.distribution.mesh import make_mesh
from experiments.model.flops import training_flops_per_token
from experiments.model.llama import init_params
from experiments.run import measures, memory_use
from experiments.run.measures import Measures
from experiments.run.metrics import events
from experiments.run.peaks import peak_flops
from experiments.run.quantities import LINE, SUMMARY, markdown_table
from experiments.run.text import TextWork
from tests.experiments.small_runs import MODEL


@pytest.fixture
def small():
    """Measures of 2 sequences of 8 tokens a step."""
    config = types.SimpleNamespace(
        batch_size=8, sequence_length=8, compute_dtype="bfloat16", block_scale=0.5
    )
    parts = types.SimpleNamespace(
        config=config,
        mesh=make_mesh(None, 8),
        work=TextWork(
            config=config,
            model=MODEL,
            data=types.SimpleNamespace(bytes_per_token=4.0),
            tokenizer=None,
        ),
        schedule=lambda count: 0.25 * count,
    )
    return Measures(parts)


def test_flops_are_six_per_multiplied_parameter_and_attention():
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    sizes = {
        jax.tree_util.keystr(path): leaf.size
        for path, leaf in jax.tree.leaves_with_path(shapes)
        if "norm" not in jax.tree_util.keystr(path)
    }
    multiplied = sum(size for path, size in sizes.items() if "embedding" not in path)
    # Scores and their sums over values: 2 products of T d, each 2 operations, 3 times.
    attention = 2 * (2 * 2 * 3) * 16 * 8
    expected = 6 * multiplied + attention // 2 * MODEL.num_layers
    assert training_flops_per_token(MODEL, 8) == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("Tesla V100-SXM2-16GB", "float32", 15.7e12),
        # What the device cannot multiply, a part of a device, and other devices.
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA L40S", "bfloat16", None),
        ("TPU v5 lite", "float32", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("cpu", "float32", None),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_type(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak


def test_mfu_is_null_where_the_peak_is_not_known(small):
    assert small.speed(128, 2, 4.0) == {
        "tokens_per_second": 32.0,
        "step_seconds": 2.0,
        "mfu": None,
    }


def test_mfu_is_the_share_of_the_peak_of_all_devices(small, monkeypatch):
    monkeypatch.setattr(measures, "peak_flops", lambda kind, dtype: 1e6)
    known = Measures(small._parts)
    devices = jax.local_device_count()
    assert known.peak_flops == devices * 1e6
    expected = 32.0 * training_flops_per_token(MODEL, 8) / (devices * 1e6)
    assert known.speed(128, 2, 4.0)["mfu"] == pytest.approx(expected)


def test_a_validation_has_perplexity_and_bits_per_byte(small):
    found = small._parts.work.numbers(float(np.log(16)))
    assert found["validation_perplexity"] == pytest.approx(16)
    # Four bits per token of four bytes.
    assert found["validation_bits_per_byte"] == pytest.approx(1)


def test_a_diverged_validation_is_still_written_down(small):
    assert np.isnan(small._parts.work.numbers(float("nan"))["validation_perplexity"])
    assert small._parts.work.numbers(float("inf"))["validation_perplexity"] > 1e300


def test_a_step_has_the_rates_of_its_own_update(small):
    metrics = {name: np.float32(1) for name in ("loss", "grad_norm", "rejected")}
    record = small.step(3, metrics, {})
    assert (record["learning_rate"], record["block_learning_rate"]) == (0.5, 0.25)


class Device:
    def __init__(self, platform, *stats):
        self.platform = platform
        self._stats = stats

    def memory_stats(self):
        if not self._stats:
            return None
        return dict(
            zip(("bytes_in_use", "peak_bytes_in_use"), self._stats, strict=True)
        )


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [Device("gpu", 5, 9), Device("gpu", 6, 8)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_use.memory_use() == memory_use.MemoryUse(6, 9, "device")


def test_memory_of_a_device_that_does_not_say_is_null(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("tpu")])
    assert memory_use.memory_use() == memory_use.MemoryUse(None, None, "device")


def test_on_a_cpu_memory_is_that_of_the_process():
    before = memory_use.memory_use()
    block = np.ones(50_000_000, np.uint8)
    after = memory_use.memory_use()
    assert after.source == "process"
    assert after.in_use is not None
    assert before.in_use is not None
    assert after.in_use - before.in_use > block.nbytes // 2
    assert after.peak is not None
    assert after.peak >= after.in_use


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_use, "_STATUS", tmp_path / "none")
    found = memory_use.memory_use()
    assert found.in_use is None
    assert found.peak is not None
    assert 10e6 < found.peak < 1e12


def test_events_are_grouped():
    record = {
        **{"step": 3, "loss": 2.0, "mfu": None, "validation_loss": 1.5},
        **{"validation_bits_per_byte": 0.5, "ranks": {"w": [2, 4], "v": 3}},
    }
    assert events(record) == {
        "train/loss": 2.0,
        "eval/loss": 1.5,
        "eval/bits_per_byte": 0.5,
        "rank/w": 3.0,
        "rank/v": 3,
    }


@pytest.mark.parametrize("quantities", [LINE, SUMMARY])
def test_each_quantity_is_explained_once(quantities):
    names = [quantity.name for quantity in quantities]
    assert len(set(names)) == len(names)
    for quantity in quantities:
        assert quantity.meaning.endswith("."), quantity.name
    assert markdown_table(quantities).count("\n") == len(names) + 2


def test_a_package_that_is_not_installed_costs_no_summary():
    # As in a checkout on PYTHONPATH.
    found = versions(["no-such-package", "jax"])
    assert found["no-such-package"] == "not installed"
    assert found["jax"] == jax.__version__
