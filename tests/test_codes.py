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
from lowrank_optax.rules.hashing import dither

LARGEST = {"signed": 127, "root": 254, "linear": 127, "packed": 7}
# What of its value a code is the multiple of; seeded formats are rounded by it.
POWERS = {"signed": 2, "root": 4, "linear": 1, "packed": 1}
SEEDED = ("signed", "root")
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
    "linear columns": ((12, 5), (4, 1), "linear"),
    "linear ragged": ((11, 5), (4, 1), "linear"),
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


def empty(shape, tile, kind, seed=0):
    """Returns a coded array of zeros."""
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), coded_like(shape, tile, kind)
    )
    if kind not in SEEDED:
        return zeros
    count = np.arange(zeros.seed.size, dtype=np.uint32).reshape(zeros.seed.shape)
    return zeros._replace(seed=jnp.asarray(count * np.uint32(77) + np.uint32(seed)))


def bounds(array, scales, kind):
    """Returns the values of the codes below and above, in float64.

    Args:
        array: Values.
        scales: Of the block of each value.
        kind: The format.
    """
    power, signs = POWERS[kind], np.sign(array)
    size = np.abs(np.asarray(array, np.float64)) ** (1 / power)
    codes = size / scales * LARGEST[kind]
    found = (np.floor(codes - 1e-4), np.ceil(codes + 1e-4))
    if kind not in SEEDED:
        found = (np.rint(codes),) * 2
    if kind == "root":
        found = tuple(np.maximum(x, array > 0) for x in found)
    return [signs * (x / LARGEST[kind] * scales) ** power for x in found]


def block_scales(array, tile, kind):
    """Returns the scale of the block of each value, in float64, by loops."""
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
                largest = np.abs(matrix[i : i + g, j : j + w]).max()
                out[k, i : i + g, j : j + w] = largest ** (1 / POWERS[kind])
    # A first scale leaves room to grow.
    return out.reshape(array.shape) * (1.05 if kind in SEEDED else 1)


@every_case
def test_values_come_back_as_the_codes_next_to_them(shape, tile, kind):
    array = values(shape, kind)
    like = empty(shape, tile, kind)
    coded = jax.jit(encode)(array, like)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), coded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert format_of(coded) == kind
    assert shape_of(coded) == shape
    low, high = bounds(array, block_scales(array, tile, kind), kind)
    back = np.asarray(decode(coded), np.float64)
    # Float32 rounding; another code would be off by a whole step.
    close = [np.abs(back - x) <= 4e-6 * np.abs(x) for x in (low, high)]
    assert np.all(close[0] | close[1])


@pytest.mark.parametrize("kind", SEEDED)
def test_codes_are_right_on_average(kind):
    """Over places and over seeds in a row, a code's mean is what it stands for."""
    wanted = np.asarray([[254.0], [100.3], [9.7], [1.3]]) / 254
    array = np.broadcast_to(wanted ** POWERS[kind], (4, 64)).astype(np.float32)
    coded, found = empty((4, 64), (4, 1), kind, seed=5), []
    for _ in range(64):
        coded = encode(jnp.asarray(array), coded)
        found.append(np.asarray(coded.codes, np.float64))
    codes = wanted / 1.05 * LARGEST[kind]
    # 4,096 draws of at most half a step's deviation; the sequences are more even still.
    np.testing.assert_allclose(
        np.mean(found, axis=(0, 2))[:, None], codes, atol=3 * 0.5 / 64
    )
    # Each place by itself: 64 of a golden sequence miss by at most 1.5 / 64 or so.
    np.testing.assert_allclose(
        np.mean(found, axis=0), np.broadcast_to(codes, (4, 64)), atol=2 / 64
    )


@pytest.mark.parametrize("kind", SEEDED)
def test_a_value_that_decays_alone_decays_as_in_float64(kind):
    """By less than half a step a time: rounding to nearest would never move it."""
    array = np.ones((4, 1), np.float32)
    coded = encode(jnp.asarray(array), empty((4, 1), (4, 1), kind))
    decayed = np.asarray([[1.0], [0.999], [0.999], [0.999]], np.float32)
    step = jax.jit(lambda c: encode(decode(c) * decayed, c))
    for _ in range(2000):
        coded = step(coded)
    expected = np.float64(0.999) ** 2000
    size = LARGEST[kind] / 1.05 * expected ** (1 / POWERS[kind])
    # Two codes at most; that is 2 power / size of the value.
    error = np.abs(np.asarray(decode(coded))[1:] / expected - 1)
    assert np.all(error < 2 * POWERS[kind] / size * 1.2)
    np.testing.assert_allclose(np.asarray(decode(coded))[0], 1, rtol=2e-2)


def test_a_scale_stays_while_its_block_fills_it():
    like = empty((4, 1), (4, 1), "signed")
    coded = encode(jnp.full((4, 1), 4.0), like)
    np.testing.assert_allclose(coded.absmax, 2.1)
    for value, scale in ((4.4, 2.1), (3.0, 2.1), (2.0, 1.05 * 2**0.5), (9.0, 3.15)):
        coded = encode(jnp.full((4, 1), value), coded)
        np.testing.assert_allclose(coded.absmax, scale, rtol=1e-6)


@pytest.mark.parametrize("kind", SEEDED)
def test_the_largest_value_of_a_block_has_a_code(kind):
    """Rounding may bring it above its scale: it must not wrap around."""
    scales = jnp.asarray(
        np.random.default_rng(0).uniform(0.1, 10, (1, 5000)), jnp.float32
    )
    full = empty((1, 5000), (1, 1), kind)._replace(absmax=scales)
    for sign in (1, -1) if kind == "signed" else (1,):
        coded = encode(sign * scales ** POWERS[kind], full)
        back = decode(coded)
        assert np.all(np.isfinite(back))
        # A code less, where rounding brought it under its scale.
        width = POWERS[kind] / LARGEST[kind]
        np.testing.assert_allclose(
            back, sign * scales ** POWERS[kind], rtol=1.01 * width
        )


def test_matrices_of_a_stack_are_coded_as_each_by_itself():
    array = jnp.asarray(values((3, 6, 5), "signed"))
    like = empty((3, 6, 5), (4, 1), "signed")
    together = encode(array, like)
    for i in range(3):
        alone = encode(array[i], Coded(like.codes[i], like.absmax[i], like.seed[i]))
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(x, y[i])


@every_case
def test_what_has_been_decoded_is_coded_the_same(shape, tile, kind):
    coded = encode(jnp.asarray(values(shape, kind)), empty(shape, tile, kind))
    again = encode(decode(coded), coded)
    np.testing.assert_array_equal(again.codes, coded.codes)
    np.testing.assert_allclose(again.absmax, coded.absmax, rtol=1e-6)


@every_case
def test_zeros_stay_zeros(shape, tile, kind):
    coded = encode(jnp.zeros(shape), empty(shape, tile, kind))
    assert not np.any(decode(coded))


@pytest.mark.parametrize("kind", ["signed", "root", "linear"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_touches_no_other(kind, bad):
    array, like = values((8, 6), kind), empty((8, 6), (4, 1), kind)
    array[2, 3] = 0
    expected = np.array(decode(encode(jnp.asarray(array), like)))
    array[2, 3] = bad
    actual = np.array(decode(encode(jnp.asarray(array), like)))
    assert np.isnan(actual[2, 3])
    actual[2, 3] = expected[2, 3]
    np.testing.assert_array_equal(actual, expected)


def test_packed_codes_make_what_is_not_finite_zero():
    array, like = values((8, 6), "packed"), empty((8, 6), (4, 1), "packed")
    array[2, 3] = np.nan
    back = np.asarray(decode(encode(jnp.asarray(array), like)))
    assert back[2, 3] == 0
    assert np.all(np.isfinite(back))


def test_no_second_moment_above_zero_becomes_zero():
    array = jnp.asarray([[1.0, 1e-12, 1e-30, 0.0]]).T
    back = decode(encode(array, empty((4, 1), (4, 1), "root")))
    assert np.all((np.asarray(back) > 0) == [[True], [True], [True], [False]])


def test_the_smallest_blocks_are_finite():
    array = jnp.full((4, 2), 1e-38)
    for kind in ("signed", "root"):
        back = decode(encode(array, empty((4, 2), (4, 1), kind)))
        assert np.all(np.isfinite(back))
        np.testing.assert_allclose(back, 1e-38, atol=1.1e-38)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("kind", ["signed", "root", "linear", "packed"])
def test_columns_are_cut_and_grown_without_a_new_rounding(kind, columns):
    coded = encode(jnp.asarray(values((7, 6), kind)), empty((7, 6), (4, 1), kind))
    resized = with_columns(coded, columns)
    expected = np.zeros((7, columns), np.float32)
    kept = np.asarray(decode(coded))[:, :columns]
    expected[:, : kept.shape[1]] = kept
    assert shape_of(resized) == (7, columns)
    assert format_of(resized) == kind
    np.testing.assert_array_equal(decode(resized), expected)


def test_shapes_are_resized_as_arrays_are():
    for kind in ("signed", "linear", "packed"):
        like = coded_like((7, 6), (4, 1), kind)
        coded = encode(jnp.ones((7, 6)), empty((7, 6), (4, 1), kind))
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
    coded = encode(jnp.ones((8, 4)), empty((8, 4), (4, 1), "signed"))
    assert isinstance(coded, Coded)
    np.testing.assert_array_equal(decode(coded._asdict()), decode(coded))


def test_places_of_a_matrix_are_rounded_by_numbers_of_their_own():
    found = np.asarray(dither(jnp.uint32(3), (64, 64)))
    # 4,096 of 2^24: half a pair is equal by chance.
    assert len(np.unique(found)) > 4090
