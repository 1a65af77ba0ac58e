"""Which arrays of a state are stored in few bits, and in which format."""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.binding.moments import owner_and_field
from lowrank_optax.binding.states import is_low_rank, low_rank_record, slots_of
from lowrank_optax.codes import (
    Coded,
    Format,
    coded_like,
    coded_record,
    format_of,
    is_coded,
    shape_of,
)
from lowrank_optax.kinds import Kind
from lowrank_optax.matrix.boxes import is_box, unboxed
from lowrank_optax.projected import gradients_by_path
from lowrank_optax.storage.coded_arrays import first_encoded

_MOMENTS: dict[str, Format] = {"first": "signed", "second": "root"}
_BASES: dict[int, Format] = {8: "linear", 4: "packed"}
_LEAST_BLOCK = 32
_CODED_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_SUBSPACES = jax.tree_util.GetAttrKey("subspaces")


def is_stored(node: Any) -> bool:
    """Returns whether a node is a coded array, or a low-rank state with its own."""
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
class Formats:
    """The formats of a state's arrays; see :func:`lowrank_optax.low_bit`.

    Attributes:
        bits: 8 for the moments; None: they are not coded.
        basis_bits: 8 or 4 for the bases; None: they are not coded.
        block: Largest number of values in a block.
        min_size: Arrays with fewer values are not coded.
        kinds: Kind of each known field, by its name.
        seed: Of the rounding.
    """

    bits: int | None
    basis_bits: int | None
    block: int
    min_size: int
    kinds: Mapping[str, Kind]
    seed: int

    def encoded(self, state: Any, params: Any) -> Any:
        """Returns a float32 state with arrays encoded in these formats."""
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
        """Raises if a state was made with other formats."""
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

    def check_knows(self, state: Any, params: Any) -> None:
        """Raises if nothing is coded, for want of known fields like the parameters."""
        if any(self._likes(state, params).values()):
            return
        shapes = {x: jnp.shape(leaf) for x, leaf in gradients_by_path(params).items()}
        unknown = set()
        for path, leaf in jax.tree.leaves_with_path(unboxed(state), is_leaf=is_stored):
            owner, field = owner_and_field(path, shapes.keys())
            if is_stored(leaf) or owner is None or field in self.kinds:
                continue
            if leaf.shape == shapes[owner] and leaf.size >= self.min_size:
                unknown.add(field)
        if unknown:
            raise ValueError(
                f"low_bit knows no field of the state; of {', '.join(sorted(unknown))} "
                f"name the moments by low_bit(..., moments={{name: kind}}), where a "
                f"kind is one of {get_args(Kind)}."
            )

    def _arrays(self, state: Any, params: Any) -> Iterator[_Array]:
        owners, state = gradients_by_path(params).keys(), unboxed(state)
        for prefix, node in jax.tree.leaves_with_path(state, is_leaf=is_stored):
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
