"""GGUF files: weights in their places, and one line for what cannot be read."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.model.gguf_files import load_gguf
from experiments.model.hugging_face import load_llama, read_shape
from tests.experiments import llama_reference

small_gguf = pytest.importorskip("tests.experiments.small_gguf", reason="needs gguf")
CONFIG = small_gguf.CONFIG


@pytest.fixture(scope="module")
def tensors():
    return small_gguf.random_tensors()


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_tensor_lands_in_its_place(tmp_path, tie_embeddings):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    params = llama_reference.random_params(config)
    path = small_gguf.write(tmp_path / "m.gguf", small_gguf.tensors_of(params))

    found, loaded = load_llama(path)

    assert found == read_shape(path) == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_scores_are_those_of_neighbours_that_rotate(tmp_path, tensors):
    # ggml turns the planes (2 i, 2 i + 1) of what the rows of its file give.
    path = small_gguf.write(tmp_path / "m.gguf", tensors)
    kernels = load_gguf(path)[1]["blocks"]["attention"]
    x = np.random.default_rng(0).standard_normal(32)

    def turned(name, position):
        planes = (tensors[name][:8] @ x).reshape(4, 2) @ [1, 1j]
        return planes * np.exp(1j * position * 50.0 ** (-np.arange(4) / 4))

    def ours(kernel, position):
        return llama_reference.rotate(x @ kernel[0][:, :8], position, 50.0)

    query, key = turned("blk.0.attn_q.weight", 9), turned("blk.0.attn_k.weight", 2)
    expected = (query * key.conj()).real.sum()
    found = ours(kernels["query"], 9) @ ours(kernels["key"], 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_quantized_matrices_are_dequantized_to_float32(tmp_path, tensors):
    path = small_gguf.write(tmp_path / "m.gguf", tensors, quantization="Q8_0")

    loaded = load_gguf(path)[1]

    blocks = tensors["output.weight"].reshape(40, 1, 32)
    # Q8_0: 32 numbers have one float16 scale, the largest of them by 127.
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    expected = np.round(blocks / scale) * scale.astype(np.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(loaded["head"].T, expected[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(loaded["norm"], tensors["output_norm.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported; .*'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, r"scaling.type 'yarn' is not supported"),
        ({"llama.rope.scaling.factor": 8.0}, r"scaling.factor 8.0 is not supported"),
        ({"llama.expert_count": 8}, "expert_count 8 is not supported"),
        ({"llama.rope.dimension_count": 4}, "dimension_count 4 is not .* = 8"),
        ({"llama.attention.key_length": 16}, "key_length 16 is not supported; .* = 8"),
        ({"llama.block_count": None}, "field llama.block_count is missing"),
        ({"llama.block_count": "two"}, "block_count is two; it must be of type int"),
        ({"llama.block_count": 3}, r"tensor blk\.2\..* is missing \(9 in all\)"),
        ({"llama.block_count": 1}, r"tensor blk\.1\..* is not expected \(9 in all\)"),
        (
            {"llama.vocab_size": 41},
            r"token_embd.weight has shape \(40, 32\), .*\(41, 32",
        ),
    ],
)
def test_fields_that_do_not_fit_are_errors(tmp_path, tensors, fields, message):
    path = small_gguf.write(tmp_path / "m.gguf", tensors, **fields)

    with pytest.raises(UserError, match=f"m.gguf: .*{message}"):
        load_llama(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "rope_freqs.weight",
            np.ones(4, np.float32),
            "rope_freqs.* scales rotary posi",
        ),
        ("blk.0.attn_q.bias", np.ones(32, np.float32), "attn_q.bias is not expected"),
        (
            "output_norm.weight",
            np.ones(31, np.float32),
            r"has shape \(31,\), .*\(32,\);",
        ),
        (
            "output_norm.weight",
            np.ones(32, np.int8),
            "has the quantization I8, which g",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_errors(tmp_path, tensors, name, tensor, message):
    path = small_gguf.write(tmp_path / "m.gguf", {**tensors, name: tensor})

    with pytest.raises(UserError, match=f"m.gguf: tensor .*{message}"):
        load_llama(path)


@pytest.mark.parametrize("content", [b"", b"no", b"text, and more of it" * 9, None])
def test_what_is_no_gguf_file_is_an_error(tmp_path, tensors, content):
    path = small_gguf.write(tmp_path / "m.gguf", tensors)
    # None: its first half.
    path.write_bytes(path.read_bytes()[:7000] if content is None else content)

    with pytest.raises(UserError, match=r"m\.gguf is not a GGUF file .*; download it"):
        load_llama(path)


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"m\.gguf cannot be read \(No such file"):
        load_llama(tmp_path / "m.gguf")


def test_another_file_at_the_place_is_read_anew(tmp_path, tensors):
    path = small_gguf.write(tmp_path / "m.gguf", tensors)
    assert read_shape(path).max_positions == 77

    small_gguf.write(path, tensors, **{"llama.context_length": 512})

    assert read_shape(path).max_positions == 512


def test_without_its_package_the_installation_is_named(tmp_path, tensors, monkeypatch):
    path = small_gguf.write(tmp_path / "m.gguf", tensors)
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(UserError, match=r"needs the package gguf; .*'\.\[finetune\]'"):
        load_llama(path)
