"""``low_bit``: the moments of any optimizer in 8 bits, bases in 8 or 4."""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.moments import check_is_not_centered, owner_and_field
from lowrank_optax.binding.states import is_low_rank, low_rank_record, slots_of
from lowrank_optax.checks import as_count, check_is_static
from lowrank_optax.codes import (
    Coded,
    Format,
    coded_like,
    coded_record,
    format_of,
    is_coded,
    shape_of,
)
from lowrank_optax.kinds import Kind, kinds_of
from lowrank_optax.matrix.boxes import is_box, unboxed
from lowrank_optax.projected import gradients_by_path
from lowrank_optax.rules.budget import stored_as
from lowrank_optax.storage.coded_arrays import decoded, encoded, first_encoded

_MOMENTS: dict[str, Format] = {"first": "signed", "second": "root"}
_BASES: dict[int, Format] = {8: "linear", 4: "packed"}
_LEAST_BLOCK = 32
_CODED_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def low_bit(
    optimizer: optax.GradientTransformation,
    bits: Literal[8] | None = 8,
    basis_bits: Literal[8, 4] | None = None,
    *,
    block: int = 256,
    min_size: int = 4096,
    moments: Mapping[str, Kind] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the moments of ``optimizer`` in 8 bits, its bases in 8 or 4.

    Each block of values has a scale s in float32, and each value an integer code q:

    .. math::
        \text{first moments: } m \approx \pm \left(\frac{q}{127} s\right)^2, \quad
        \text{second: } v \approx \left(\frac{q}{254} s\right)^4, \quad
        \text{bases: } p \approx \frac{q}{127} s \text{ or } \frac{q}{7} s

    A second moment above zero never becomes zero. Every update decodes arrays, computes
    in float32, and encodes the results. A basis is encoded once, at its refresh,
    rounded to nearest. The rounded basis is in use from then on, for the re-basing of
    moments too.

    Codes are rounded up or down at random, and are right on average. Rounded to
    nearest, moments could not decay: at b2 = 0.999 the root of a second moment falls by
    0.05 % an update, less than half a step. Suppose that the gradients of some values
    of a block fall to 1/30 or 1/100 of the other gradients. After 5,000 updates v is
    within 1 % of v in float32, and the root mean square of Adam's updates within 2 or
    3 %. A code's power is larger on average than that of a code that is right: by up to
    1.6e-5 of the block's largest first moment, which counts for values below that.

    The format is a property of the arrays. :class:`Coded` arrays take the place of
    float32 arrays, and the state does not change otherwise. All readers of a state
    handle coded arrays: ``accumulate``, ``ranks``, ``compact``, checkpoints. ::

        low_bit(galore(1e-2))                    # 8-bit GaLore
        low_bit(adarankgrad(1e-3))               # 8-bit AdaRankGrad
        low_bit(galore(1e-2), basis_bits=4)      # with Q-GaLore's INT4 projection
        low_bit(optax.adamw(1e-3))               # 8-bit Adam

    In a subspace a block is a piece of one column, of a moment or a basis, because
    columns differ most and may be cut off. At full size a block is a piece of one row
    (one token of an embedding), or of several rows shorter than 32. A value takes
    1 + 4 / block bytes, and a matrix 4 more for its seed. The global shape of an array
    decides whether it is coded; its sharding does not. ``optimizer`` sees moments in
    half precision as float32.

    An update holds its decoded arrays in float32: a leaf's moments for all stacked
    layers. XLA on CPUs does not order for memory, and holds the moments of many leaves.
    This temporary memory may exceed the saving. For the blocks of LLaMA 60m in
    bfloat16, a step of 8-bit AdamW takes 269 MB, and a step of AdamW with bfloat16
    moments 249 MB; in float32 314 and 529 MB.

    Args:
        optimizer: Any Optax transformation, with low-rank ones anywhere inside.
        bits: 8 for the moments; None: moments stay in float32.
        basis_bits: 8 or 4 for the bases of low-rank transformations; None: bases stay
            in float32. Random bases are not stored in any case.
        block: Largest number of values in a block; >= 2.
        min_size: Arrays with fewer values stay in float32; >= 1. Norms and biases save
            little and suffer most.
        moments: Kinds of further fields of the state, beside the known ones (``mu``,
            ``nu``, ``trace``, ...): name -> "first", "second" or "constant" (not
            coded).
        seed: Seed of the rounding. A draw is a function of the seed, the array's path,
            the value's position and the number of the update. A resumed run repeats
            its draws bit for bit.

    Returns:
        A transformation with the updates of ``optimizer``, up to the error of the
        codes. A value that is not finite is coded as not a number; the other values of
        the block do not change.

    Raises:
        ValueError: If a number is out of its range; in ``init``, if a transformation
            takes the root of nu - mu^2 (``optax.scale_by_stddev``); in ``update``, if a
            state holds other formats than these arguments give.

    Example:
        >>> params = {"w": jnp.ones((512, 64))}
        >>> state = low_bit(optax.scale_by_adam()).init(params)
        >>> state.mu["w"].codes.dtype, state.mu["w"].absmax.shape
        (dtype('int8'), (512, 1))

    References:
        Dettmers et al., `8-bit optimizers <https://arxiv.org/abs/2110.02861>`_, 2021,
        have blocks and scales. Their codes are a table of 256 values, rounded to
        nearest; here codes are powers, rounded at random. `Q-GaLore
        <https://arxiv.org/abs/2407.08296>`_ has the basis in 4 bits; its lazy refresh
        and INT8 weights are left out.
    """
    if bits not in (8, None):
        raise ValueError(f"bits must be 8 or None, got {bits!r}.")
    if basis_bits not in (8, 4, None):
        raise ValueError(f"basis_bits must be 8, 4 or None, got {basis_bits!r}.")
    check_is_static("seed", seed, '("seed",)', "draws depend on seed")
    block, min_size = as_count("block", block, 2), as_count("min_size", min_size)
    rule = _Rule(bits, basis_bits, block, min_size, kinds_of(moments), seed)
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        with stored_as(rule.shapes):
            state = inner.init(params)
        if bits:
            check_is_not_centered(state, "each is rounded by itself")
        return rule.encoded(state, params)

    def update(updates, state, params=None, **extra_args):
        rule.check(state, updates)
        floats = jax.tree.map(decoded, state, is_leaf=_is_array)
        updates, new_state = inner.update(updates, floats, params, **extra_args)
        new_state = jax.tree.map(encoded, state, new_state, is_leaf=_is_array)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_array(node: Any) -> bool:
    """Returns whether a node is a leaf here; low-rank states decode themselves."""
    return is_coded(node) or is_low_rank(node)


class _Array(NamedTuple):
    """One array of a state, and its format.

    Attributes:
        path: Key path of the array in the state.
        node: Array, coded array, or their shapes.
        kind: Format for the array's role; None: the array is never coded.
        like: Shapes in this format; None: the array is too small, or never coded.
        in_subspace: Whether the array's columns are those of a basis.
    """

    path: tuple
    node: Any
    kind: Format | None
    like: Coded | None
    in_subspace: bool


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The formats of a state's arrays; see :func:`low_bit`."""

    bits: int | None
    basis_bits: int | None
    block: int
    min_size: int
    kinds: Mapping[str, Kind]
    seed: int

    def encoded(self, state: Any, params: Any) -> Any:
        """Returns a float32 state with arrays encoded in the formats of this rule."""
        likes = self._likes(state, params)

        def encode_leaf(path, leaf):
            like = likes.get(path)
            if like is None:
                return leaf
            name = f"{self.seed}{jax.tree_util.keystr(path)}"
            return first_encoded(leaf, like, zlib.crc32(name.encode()))

        return jax.tree_util.tree_map_with_path(encode_leaf, state, is_leaf=is_box)

    def shapes(self, state: Any, params: Any) -> Any:
        """Returns the shapes of the result of :meth:`encoded`, from shapes."""
        likes = self._likes(state, params)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: likes.get(path) or leaf, state, is_leaf=is_box
        )

    def _likes(self, state: Any, params: Any) -> dict[tuple, Coded | None]:
        """Returns the coded shapes of each array, by its path."""
        return {array.path: array.like for array in self._arrays(state, params)}

    def check(self, state: Any, params: Any) -> None:
        """Raises if a state was made under another rule."""
        arrays = list(self._arrays(state, params))
        has_codes = any(is_coded(array.node) for array in arrays)
        for path, node, kind, like, in_subspace in arrays:
            found = format_of(coded_record(node)) if is_coded(node) else None
            # A coded array stays coded, even if a cut has made it small.
            if found == (kind if like or found else None):
                continue
            # And one that was too small stays as it is, even if it has grown.
            if found is None and in_subspace and has_codes:
                continue
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is {found or 'float32'}, but "
                f"low_bit with bits={self.bits}, basis_bits={self.basis_bits}, "
                f"min_size={self.min_size} has {kind or 'float32'}; give low_bit the "
                "arguments with which the state was made."
            )

    def _arrays(self, state: Any, params: Any) -> Iterator[_Array]:
        owners, state = gradients_by_path(params).keys(), unboxed(state)
        for prefix, node in jax.tree.leaves_with_path(state, is_leaf=_is_array):
            if not is_low_rank(node):
                yield self._array(prefix, node, self._moment(prefix, owners), False)
                continue
            node = low_rank_record(node)
            slots = slots_of(node)
            for path, leaf in jax.tree.leaves_with_path(node, is_leaf=is_coded):
                if path[0] == _SUBSPACES:
                    # A NamedTuple's field, or a mapping's key in flax.nnx.Optimizer.
                    is_basis = jax.tree_util.keystr(path[-1:], simple=True) == "basis"
                    kind = _BASES.get(self.basis_bits or 0) if is_basis else None
                    yield self._array((*prefix, *path), leaf, kind, True)
                else:
                    owner, _ = owner_and_field(path, owners)
                    kind = self._moment(path, owners)
                    in_subspace = owner in slots
                    yield self._array((*prefix, *path), leaf, kind, in_subspace)

    def _moment(self, path, owners) -> Format | None:
        _, field = owner_and_field(path, owners)
        return _MOMENTS.get(self.kinds.get(field, "")) if self.bits else None

    def _array(self, path, node, kind: Format | None, in_subspace: bool) -> _Array:
        shape = shape_of(node)
        is_wide = not is_coded(node) and node.dtype not in _CODED_DTYPES
        is_large = math.prod(shape) >= self.min_size and not is_wide
        if in_subspace:
            tile = (self.block, 1)
        else:
            # Narrow rows share a block: their scales would take more than the codes.
            width = shape[-1] if shape else 1
            tile = (-(-min(_LEAST_BLOCK, self.block) // max(width, 1)), self.block)
        like = None
        if kind and shape and is_large:
            like = coded_like(shape, tile, kind)
        return _Array(path, node, kind, like, in_subspace)


_SUBSPACES = jax.tree_util.GetAttrKey("subspaces")
