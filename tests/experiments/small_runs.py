"""A model, a text and a command line so small that a whole run takes seconds."""

import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.model.hugging_face import save_llama
from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig
from experiments.pretrain_llama import main
from experiments.run.quantities import LINE

MODEL = LlamaConfig(
    vocab_size=257,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
)
# What two equal runs do not share in metrics.jsonl.
TIMES = {quantity.name for quantity in LINE if not quantity.repeats}


@functools.cache
def _params() -> dict:
    return jax.tree.map(np.asarray, init_params(MODEL, jax.random.key(1)))


def write_inputs(directory: Path, scale: float = 1.0) -> list[str]:
    """Writes weights, times ``scale``, and text; returns the flags of a run of both."""
    params = jax.tree.map(lambda x: np.float32(scale) * x, _params())
    save_llama(directory / "model", MODEL, params)
    words = random.Random(0).choices(("low", "rank", "of", "a", "gradient"), k=2000)
    (directory / "text.txt").write_text(" ".join(words))
    flags = {
        "--initial-weights": directory / "model",
        "--data": directory / "text.txt",
        "--steps": 4,
        "--batch-size": 8,
        "--sequence-length": 8,
        "--log-every": 1,
        "--eval-every": 3,
        "--eval-tokens": 100,
        "--sample-tokens": 4,
        # One step to compile and not two; what has subspace gradients says so.
        "--gradients": "full",
    }
    return [str(word) for pair in flags.items() for word in pair]


def run(*flags: object) -> int:
    """Runs the command in this process; returns its exit status."""
    return main([str(flag) for flag in flags])


def one_error_line(capsys) -> str:
    """Returns the one line that a command has written to stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def read_lines(directory: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]


def read_state(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path."""
    path = (directory / f"checkpoints/{step}/state").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Asserts that two runs have the same metrics and, bit for bit, the same state."""
    assert read_lines(one) == read_lines(other)
    ours, theirs = read_state(one, step), read_state(other, step)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
