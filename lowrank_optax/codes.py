"""One array of the state in few bits: integer codes, and a scale per block of codes.

The codes' dtype and the presence of a seed give the format; s is the block's scale:

========  =====================================  =============  ====  ==============
format    codes q                                value          seed  for
========  =====================================  =============  ====  ==============
signed    int8 in [-127, 127]                    +-(q/127 s)^2  yes   first moments
root      uint8 in [0, 254]                      (q/254 s)^4    yes   second moments
linear    int8 in [-127, 127]                    q/127 s        no    bases
packed    uint16, four of [-7, 7] along a row    q/7 s          no    bases
========  =====================================  =============  ====  ==============

The codes -128 and 255 mean NaN. To nearest, an average that decays by less than half a
step an update would never move. Arrays with a seed are rounded up or down, their codes
right on average (:func:`lowrank_optax.rules.hashing.dither`); successive draws leave
little noise. Scales stay while they can, so that the decay of one value moves no other.
Powers make steps small where values are small, because the noise is a step wide.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrix.arrays import blank
from lowrank_optax.matrix.sharding import with_automatic_axes
from lowrank_optax.rules.hashing import GOLDEN, dither

Format = Literal["signed", "root", "linear", "packed"]

_LARGEST = {"signed": 127, "root": 254, "linear": 127, "packed": 7}
_NAN = {"signed": -128, "root": 255, "linear": -128}
_DTYPES: dict[Format, Any] = {
    "signed": jnp.int8,
    "root": jnp.uint8,
    "linear": jnp.int8,
    "packed": jnp.uint16,
}
_SEEDED = ("signed", "root")
_FORMATS: dict[Any, Format] = {
    (jnp.dtype(dtype), kind in _SEEDED): kind for kind, dtype in _DTYPES.items()
}
_PER_CODE = 4  # values in each code of the packed format
# A scale stays while the largest value fills this share of its codes. A new scale
# leaves headroom for growth.
_FILLED, _HEADROOM = 0.8, 1.05
# A smaller scale has no finite inverse: such blocks are zero.
_LEAST_SCALE = 1e-35


class Coded(NamedTuple):
    """An array in few bits, in place of a float32 array.

    A block is a tile of ceil(rows / A) x ceil(columns / C) values in the last two axes.

    Attributes:
        codes: (*stack, rows, columns), int8 or uint8; packed (*stack, rows,
            ceil(columns / 4)), uint16. A vector is a single row, (n,).
        absmax: Scale of each block: its largest magnitude, or the root of this; float32
            (*stack, A, C), with C = columns if packed; (C,) for a vector.
        seed: Seed of the next rounding of each matrix, (*stack,), uint32; () for
            rounding to nearest.
    """

    codes: Any
    absmax: Any
    seed: Any = ()


def is_coded(node: Any) -> bool:
    """Returns whether a node of a state stands for one array in few bits."""
    if isinstance(node, Coded):
        return True
    return isinstance(node, Mapping) and set(node) - {"seed"} == {"codes", "absmax"}


def coded_record(node: Any) -> Any:
    """Returns a coded array as a record, also from ``flax.nnx.Optimizer``'s mapping."""
    return Coded(**node) if isinstance(node, Mapping) and is_coded(node) else node


def format_of(coded: Coded) -> Format:
    """Returns the format, from the dtype of the codes and whether there is a seed."""
    is_seeded = bool(jax.tree.leaves(coded.seed))
    return _FORMATS[jnp.dtype(coded.codes.dtype), is_seeded]


def shape_of(node: Any) -> tuple[int, ...]:
    """Returns the shape of an array, coded or not."""
    if not is_coded(node):
        return tuple(node.shape)
    coded = coded_record(node)
    if format_of(coded) == "packed":
        return (*coded.codes.shape[:-1], coded.absmax.shape[-1])
    return tuple(coded.codes.shape)


def coded_like(shape: tuple[int, ...], tile: tuple[int, int], kind: Format) -> Coded:
    """Returns the shapes of an array in few bits.

    Args:
        shape: Shape of the array, with at least one axis.
        tile: Most rows and columns of a block; one column in the packed format.
        kind: The format.
    """
    rows, columns = _rows_and_columns(shape)
    counts = (-(-rows // tile[0]), -(-columns // tile[1]))
    codes = shape
    if kind == "packed":
        # The number of scales is the number of columns.
        assert tile[1] == 1
        assert len(shape) > 1
        codes = (*shape[:-1], -(-columns // _PER_CODE))
    absmax = counts[1:] if len(shape) == 1 else (*shape[:-2], *counts)
    return Coded(
        jax.ShapeDtypeStruct(codes, _DTYPES[kind]),
        jax.ShapeDtypeStruct(absmax, jnp.float32),
        jax.ShapeDtypeStruct(shape[:-2], jnp.uint32) if kind in _SEEDED else (),
    )


def decode(node: Any) -> Any:
    """Returns a coded array as float32; any other node as it is.

    Args:
        node: :class:`Coded`, from a state under :func:`lowrank_optax.low_bit`, or any
            array.
    """
    if not is_coded(node):
        return node
    coded = coded_record(node)
    return with_automatic_axes(_decode, coded.codes, coded)


def _decode(coded: Coded) -> jax.Array:
    kind, shape = format_of(coded), shape_of(coded)
    codes = _unpacked(coded.codes, shape[-1]) if kind == "packed" else coded.codes
    values = _spread(coded.absmax, shape) * (codes.astype(jnp.float32) / _LARGEST[kind])
    if kind == "signed":
        values = values * jnp.abs(values)
    elif kind == "root":
        values = (values**2) ** 2
    if kind in _NAN:
        values = jnp.where(codes == _NAN[kind], jnp.nan, values)
    return values


def encode(array: jax.Array, like: Any) -> Any:
    """Returns an array in the format of ``like``; unchanged, if ``like`` is not coded.

    With a seed in ``like``, codes are rounded up or down, and are right on average;
    otherwise to nearest. A value that is not finite becomes NaN (0 in the packed
    format), and does not change its block. In the root format, for divisors, a negative
    value becomes NaN too, and one above 0 never becomes 0.

    Args:
        array: Values.
        like: Coded array of the same shape. The rounding takes its seed, and keeps its
            scales where possible.
    """
    if not is_coded(like):
        return array
    like = coded_record(like)
    return with_automatic_axes(_encode, like, array, like)


def _encode(array: jax.Array, like: Coded) -> Coded:
    kind = format_of(like)
    values = array.astype(jnp.float32)
    is_number = jnp.isfinite(values) & ((values >= 0) | (kind != "root"))
    values = jnp.where(is_number, values, 0)
    if kind == "signed":
        values = jnp.sign(values) * jnp.sqrt(jnp.abs(values))
    elif kind == "root":
        values = jnp.sqrt(jnp.sqrt(values))
    absmax = _block_maxima(jnp.abs(values), like.absmax.shape)
    if kind in _SEEDED:
        still = (absmax <= like.absmax) & (absmax >= _FILLED * like.absmax)
        absmax = jnp.where(still, like.absmax, _HEADROOM * absmax)
    usable = absmax >= _LEAST_SCALE
    inverse = jnp.where(usable, _LARGEST[kind] / jnp.where(usable, absmax, 1), 0)
    scaled = values * _spread(inverse, values.shape)
    if kind in _SEEDED:
        shift = dither(like.seed, _rows_and_columns(values.shape))
        codes = jnp.floor(scaled + shift.reshape(values.shape))
    else:
        codes = jnp.round(scaled)
    # A rounded inverse may exceed the largest code by a unit in the last place.
    codes = jnp.clip(codes, -_LARGEST[kind], _LARGEST[kind])
    if kind == "root":
        codes = jnp.maximum(codes, jnp.where(scaled > 0, 1, 0))
    if kind in _NAN:
        codes = jnp.where(is_number, codes, _NAN[kind])
    if kind == "packed":
        return Coded(_packed(codes.astype(jnp.int8)), absmax)
    seed = like.seed + jnp.uint32(GOLDEN) if kind in _SEEDED else ()
    return Coded(codes.astype(like.codes.dtype), absmax, seed)


def decoded_tree(tree: Any) -> Any:
    """Returns a tree with each coded array decoded."""
    return jax.tree.map(decode, tree, is_leaf=is_coded)


def encoded_tree(tree: Any, like: Any) -> Any:
    """Returns a tree with the same arrays encoded as in ``like``."""
    return jax.tree.map(lambda old, new: encode(new, old), like, tree, is_leaf=is_coded)


def with_columns(node: Any, columns: int) -> Any:
    """Returns an array, coded or not, with its last axis cut, or grown by blanks.

    Remaining columns stay the same to the bit, if no block is wider than a column.

    Args:
        node: Array or :class:`Coded`.
        columns: Columns of the result, >= 1.
    """
    if not is_coded(node):
        return _fitted(node, columns, blank(node.dtype))
    coded = coded_record(node)
    if format_of(coded) == "packed":
        codes = _fitted(coded.codes, -(-columns // _PER_CODE))
        if isinstance(codes, jax.Array):
            # The last code may still hold columns beyond the cut.
            codes = _packed(_unpacked(codes, columns))
        return Coded(codes, _fitted(coded.absmax, columns))
    tile = -(-coded.codes.shape[-1] // coded.absmax.shape[-1])
    absmax = _fitted(coded.absmax, -(-columns // tile))
    return Coded(_fitted(coded.codes, columns), absmax, coded.seed)


def _fitted(array: Any, columns: int, fill: int = 0) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:-1], columns)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)
    if columns <= array.shape[-1]:
        return array[..., :columns]
    widths = [(0, 0)] * (array.ndim - 1) + [(0, columns - array.shape[-1])]
    return jnp.pad(array, widths, constant_values=fill)


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[-2], shape[-1])


def _block_maxima(values: jax.Array, absmax_shape: tuple[int, ...]) -> jax.Array:
    """Returns the largest value of each block, shaped like the scales."""
    rows, columns = _rows_and_columns(values.shape)
    stack = values.shape[:-2]
    a, c = _rows_and_columns(absmax_shape)
    g, w = -(-rows // a), -(-columns // c)
    matrices = values.reshape(*stack, rows, columns)
    padding = [(0, 0)] * len(stack) + [(0, a * g - rows), (0, c * w - columns)]
    if any(end for _, end in padding):
        matrices = jnp.pad(matrices, padding)
    blocks = matrices.reshape(*stack, a, g, c, w)
    return jnp.max(blocks, axis=(-3, -1)).reshape(absmax_shape)


def _spread(absmax: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns each block's number at each of its values."""
    rows, columns = _rows_and_columns(shape)
    stack = shape[:-2]
    a, c = _rows_and_columns(absmax.shape)
    g, w = -(-rows // a), -(-columns // c)
    spread = absmax.reshape(*stack, a, 1, c, 1)
    spread = jnp.broadcast_to(spread, (*stack, a, g, c, w))
    spread = spread.reshape(*stack, a * g, c * w)[..., :rows, :columns]
    return spread.reshape(shape)


def _packed(codes: jax.Array) -> jax.Array:
    """Returns four codes in each number, (..., ceil(columns / 4)), uint16."""
    count = -(-codes.shape[-1] // _PER_CODE)
    nibbles = _fitted(codes, _PER_CODE * count).astype(jnp.uint16) & 0xF
    nibbles = nibbles.reshape(*codes.shape[:-1], count, _PER_CODE)
    return jnp.sum(nibbles << _shifts(nibbles.ndim), axis=-1, dtype=jnp.uint16)


def _unpacked(packed: jax.Array, columns: int) -> jax.Array:
    """Returns the codes, (..., columns), int8."""
    nibbles = packed[..., None] >> _shifts(packed.ndim + 1) & 0xF
    flat = nibbles.reshape(*packed.shape[:-1], -1)[..., :columns].astype(jnp.int8)
    return jnp.where(flat > 7, flat - 16, flat)


def _shifts(ndim: int) -> jax.Array:
    """Returns the bit position of each code, (1, ..., 1, 4), of full rank."""
    places = 4 * jnp.arange(_PER_CODE, dtype=jnp.uint16)
    return places.reshape((1,) * (ndim - 1) + (_PER_CODE,))


def bytes_of(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
