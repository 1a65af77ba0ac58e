"""Meshes: the flag, the shares of a batch, and runs that are cut over them."""

import json

import jax
import numpy as np
import pytest

from experiments.data.packing import Windows
from experiments.data.pipeline import make_data
from experiments.data.tokenizers import load_tokenizer
from experiments.distribution.mesh import axis_sizes, make_mesh
from experiments.distribution.placement import own_rows, shard_batch
from experiments.distribution.rules import bytes_per_device
from experiments.errors import UserError
from experiments.run.assemble import assemble
from experiments.run.config import parse
from tests.experiments.small_runs import one_error_line, read_lines, run


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, (8, 1, 1)),
        ("fsdp=8", (1, 8, 1)),
        ("fsdp=4", (2, 4, 1)),
        ("tensor=2, fsdp=2", (2, 2, 2)),
        ("data=4,tensor=2", (4, 1, 2)),
    ],
)
def test_data_has_the_devices_that_are_left(text, sizes):
    assert axis_sizes(text, 8) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=3", "data 3 x fsdp 1 x tensor 1 = 3 devices, but there are 8"),
        ("fsdp=3", "= 3 devices, but there are 8"),
        ("rows=8", "'rows=8' is not one of data, fsdp, tensor"),
        ("fsdp=0", "'fsdp=0' is not one of"),
        ("fsdp=2,fsdp=4", "once each"),
        ("8", "give it like data=2,fsdp=4"),
    ],
)
def test_another_mesh_is_refused_in_a_line(text, words):
    with pytest.raises(UserError, match=f"--mesh {text}") as error:
        axis_sizes(text, 8)
    assert words in str(error.value)


def test_a_batch_that_the_mesh_cannot_share_is_refused():
    with pytest.raises(UserError, match="4 shares, data x fsdp, that --mesh tensor=2"):
        make_mesh("tensor=2", 6)


def test_one_process_has_all_sequences():
    mesh = make_mesh("fsdp=2,tensor=2", 8)
    assert own_rows(mesh, 8) == frozenset(range(8))
    placed = shard_batch({"inputs": np.arange(8)}, mesh)["inputs"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}


def test_a_process_reads_its_own_sequences_and_the_order_is_that_of_all(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words that are different " * 40)
    read = []

    class Noted(Windows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def batches(rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("experiments.data.pipeline.Windows", Noted)
            data = make_data(
                str(text),
                load_tokenizer("bytes"),
                batch_size=6,
                sequence_length=16,
                seed=1,
                rows=rows,
            )
        read.clear()
        iterator = data.train_iterator()
        found = [next(iterator) for _ in range(20)]
        state = iterator.get_state()
        iterator.close()
        return found, state

    whole, whole_state = batches(None)
    parts = [batches(rows) for rows in ({0, 1}, {2, 3}, {4, 5})]
    assert {str(state) for _, state in parts} == {str(whole_state)}
    for i, batch in enumerate(whole):
        for name, array in batch.items():
            shares = [
                part[i][name][2 * j : 2 * j + 2] for j, (part, _) in enumerate(parts)
            ]
            np.testing.assert_array_equal(np.concatenate(shares), array)
    # A batch has a third of its sequences from the text.
    assert not parts[0][0][0]["weights"][2:].any()


@pytest.fixture(scope="module")
def flags(inputs):
    # Their updates do not hang on rounding: bases of close energies do.
    return [*inputs, "--optimizer", "sumo", "--rank", 4]


@pytest.fixture(scope="module")
def of_one(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr("experiments.distribution.mesh.all_devices", lambda: device)
        assert run(*flags, "--out", out) == 0
    return read_lines(out)


@pytest.mark.parametrize(
    "mesh", [pytest.param("fsdp=4", marks=pytest.mark.slow), "fsdp=2,tensor=2"]
)
def test_a_run_over_a_mesh_is_that_of_one_device(
    mesh, flags, of_one, tmp_path, monkeypatch
):
    # So small a model has no larger array; its bases are cut then.
    monkeypatch.setattr("experiments.distribution.rules.LEAST_BYTES", 256)
    words = [*map(str, flags), "--mesh", mesh]
    parts = assemble(parse(words), lambda text: None)
    params, state = parts.abstract_state()
    for tree in (params, state):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        # Norms and counters are whole everywhere; so is tensor's odd vocabulary.
        assert bytes_per_device(tree) < 0.6 * whole
    assert run(*words, "--out", tmp_path / "out") == 0
    found = read_lines(tmp_path / "out")
    # Sums in another order: float32's rounding through four updates.
    for line, expected in zip(found, of_one, strict=True):
        for name in ("loss", "validation_loss"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(flags, of_one, tmp_path):
    out = tmp_path / "out"
    assert run(*flags, "--out", out, "--mesh", "fsdp=8", "--steps", 2) == 0
    assert run("--out", out, "--resume", "--mesh", "data=4,tensor=2", "--steps", 4) == 0
    last, expected = read_lines(out)[-1], of_one[-1]
    # The schedule of two steps was another one at first.
    assert last["step"] == expected["step"]
    assert last["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert "mesh" in json.loads((out / "config.json").read_text())


def test_a_wrong_mesh_is_one_line(flags, tmp_path, capsys):
    assert run(*flags, "--mesh", "fsdp=3", "--out", tmp_path / "out") == 2
    assert "--mesh fsdp=3" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()
