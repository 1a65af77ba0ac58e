"""Codes and their blocks, against loops in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.codes import (
    Coded,
    coded_like,
    decode,
    encode,
    format_of,
    shape_of,
    with_columns,
)

LARGEST = {"signed": 127, "root": 254, "packed": 7}
# Blocks that fill the array, that do not divide it, that are larger than it; a vector;
# a stack.
CASES = {
    "signed columns": ((12, 5), (4, 1), "signed"),
    "signed ragged": ((11, 5), (4, 1), "signed"),
    "signed rows": ((3, 10), (1, 4), "signed"),
    "signed whole": ((3, 5), (256, 1), "signed"),
    "signed vector": ((10,), (1, 4), "signed"),
    "signed stack": ((2, 3, 6, 4), (4, 1), "signed"),
    "root columns": ((12, 5), (4, 1), "root"),
    "root rows": ((3, 10), (1, 256), "root"),
    "root vector": ((10,), (1, 4), "root"),
    "packed even": ((12, 6), (4, 1), "packed"),
    "packed odd": ((11, 5), (4, 1), "packed"),
    "packed stack": ((2, 7, 3), (4, 1), "packed"),
}
every_case = pytest.mark.parametrize(
    ("shape", "tile", "kind"), CASES.values(), ids=CASES
)


def values(shape, kind, seed=0):
    """Returns values whose columns and rows differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, size=(1, *shape[1:]))
    return (x**2 if kind == "root" else x).astype(np.float32)


def reference(array, tile, kind):
    """Returns the values that come back, block by block, in float64."""
    matrices = np.asarray(array, np.float64)
    matrices = matrices.reshape(
        -1, *(matrices.shape[-2:] if matrices.ndim > 1 else (1, matrices.size))
    )
    out = np.zeros_like(matrices)
    rows, columns = matrices.shape[1:]
    # Blocks of equal length, as many as blocks of the asked length are needed.
    g = -(-rows // -(-rows // tile[0]))
    w = -(-columns // -(-columns // tile[1]))
    for k, matrix in enumerate(matrices):
        for i in range(0, rows, g):
            for j in range(0, columns, w):
                block = matrix[i : i + g, j : j + w]
                signs = np.sign(block)
                size = np.sqrt(block) if kind == "root" else np.abs(block)
                scale = size.max()
                codes = np.rint(size / scale * LARGEST[kind])
                if kind == "root":
                    codes = np.maximum(codes, size > 0)
                back = codes / LARGEST[kind] * scale
                out[k, i : i + g, j : j + w] = (
                    back**2 if kind == "root" else signs * back
                )
    return out.reshape(array.shape)


@every_case
def test_values_come_back_as_the_reference_rounds_them(shape, tile, kind):
    array = values(shape, kind)
    like = coded_like(shape, tile, kind)
    coded = jax.jit(lambda x: encode(x, like))(array)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), coded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert format_of(coded) == kind
    assert shape_of(coded) == shape
    expected = reference(array, tile, kind)
    # Float32 rounding; a value in the middle of two codes would be off by a whole step.
    np.testing.assert_allclose(decode(coded), expected, rtol=2e-6, atol=0)


@every_case
def test_what_has_been_decoded_is_coded_the_same(shape, tile, kind):
    like = coded_like(shape, tile, kind)
    coded = encode(jnp.asarray(values(shape, kind)), like)
    again = encode(decode(coded), like)
    np.testing.assert_array_equal(again.codes, coded.codes)
    np.testing.assert_allclose(again.absmax, coded.absmax, rtol=1e-6)


@every_case
def test_zeros_stay_zeros(shape, tile, kind):
    coded = encode(jnp.zeros(shape), coded_like(shape, tile, kind))
    assert not np.any(decode(coded))


@pytest.mark.parametrize("kind", ["signed", "root"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_touches_no_other(kind, bad):
    array, like = values((8, 6), kind), coded_like((8, 6), (4, 1), kind)
    array[2, 3] = 0
    expected = np.array(decode(encode(jnp.asarray(array), like)))
    array[2, 3] = bad
    actual = np.array(decode(encode(jnp.asarray(array), like)))
    assert np.isnan(actual[2, 3])
    actual[2, 3] = expected[2, 3]
    np.testing.assert_array_equal(actual, expected)


def test_packed_codes_make_what_is_not_finite_zero():
    array, like = values((8, 6), "packed"), coded_like((8, 6), (4, 1), "packed")
    array[2, 3] = np.nan
    back = np.asarray(decode(encode(jnp.asarray(array), like)))
    assert back[2, 3] == 0
    assert np.all(np.isfinite(back))


def test_no_second_moment_above_zero_becomes_zero():
    array = jnp.asarray([[1.0, 1e-12, 1e-30, 0.0]]).T
    back = decode(encode(array, coded_like((4, 1), (4, 1), "root")))
    assert np.all((np.asarray(back) > 0) == [[True], [True], [True], [False]])


def test_the_smallest_blocks_are_finite():
    array = jnp.full((4, 2), 1e-38)
    for kind in ("signed", "root"):
        back = decode(encode(array, coded_like((4, 2), (4, 1), kind)))
        assert np.all(np.isfinite(back))
        np.testing.assert_allclose(back, 1e-38, atol=1.1e-38)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("kind", ["signed", "root", "packed"])
def test_columns_are_cut_and_grown_without_a_new_rounding(kind, columns):
    coded = encode(jnp.asarray(values((7, 6), kind)), coded_like((7, 6), (4, 1), kind))
    resized = with_columns(coded, columns)
    expected = np.zeros((7, columns), np.float32)
    kept = np.asarray(decode(coded))[:, :columns]
    expected[:, : kept.shape[1]] = kept
    assert shape_of(resized) == (7, columns)
    assert format_of(resized) == kind
    np.testing.assert_array_equal(decode(resized), expected)


def test_shapes_are_resized_as_arrays_are():
    for kind in ("signed", "packed"):
        like = coded_like((7, 6), (4, 1), kind)
        coded = encode(jnp.ones((7, 6)), like)
        for columns in (3, 8):
            shapes = jax.tree.map(lambda x: x.shape, with_columns(like, columns))
            arrays = jax.tree.map(lambda x: x.shape, with_columns(coded, columns))
            assert shapes == arrays


def test_arrays_that_are_not_coded_pass():
    array = jnp.ones((3, 4))
    assert decode(array) is array
    assert encode(array, array) is array
    assert with_columns(array, 2).shape == (3, 2)


def test_a_mapping_of_the_fields_is_a_coded_array():
    coded = encode(jnp.ones((8, 4)), coded_like((8, 4), (4, 1), "signed"))
    assert isinstance(coded, Coded)
    np.testing.assert_array_equal(decode(coded._asdict()), decode(coded))
