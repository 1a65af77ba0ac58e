"""A projected parameter on its way through a traced program."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lowrank_optax.gradients.layout import Dims


class Term(NamedTuple):
    """How an array would change: by sum_r coordinates * basis, broadcast.

    Both have one axis per atom of the array, of the atom's size or 1, and the rank.

    Attributes:
        coordinates: (*atoms, r); only their gradient counts, which is asked for.
        basis: (*atoms, r).
    """

    coordinates: Any
    basis: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Followed:
    """What has become of parameters that are projected.

    Attributes:
        value: The array. Its gradient goes to the coordinates alone.
        terms: One for each parameter in it, and for each array added to it or
            multiplied with it.
        dims: What each dimension of ``value`` consists of.
        names: Key paths of the parameters, for errors.
        is_sum: Whether an array that is no parameter was added to it.
    """

    value: Any
    terms: tuple[Term, ...]
    dims: Dims = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    is_sum: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def atoms(self) -> tuple[int, ...]:
        """Sizes of all atoms."""
        return tuple(size for dim in self.dims for size in dim)

    def changed(
        self, change: Callable[[jax.Array], jax.Array], dims: Dims
    ) -> "Followed":
        """Returns the same with coordinates and bases changed, the value not yet."""
        terms = tuple(Term(change(term[0]), change(term[1])) for term in self.terms)
        return dataclasses.replace(self, terms=terms, dims=dims)

    def of(self, value: jax.Array) -> "Followed":
        """Returns the same with another value."""
        return dataclasses.replace(self, value=value)

    def without_arrays(self) -> "Followed":
        """Returns the same with None in the place of all arrays."""
        return jax.tree.map(lambda _: None, self)

    @property
    def is_free(self) -> bool:
        """Whether anything may be done to it, as to activations.

        So it is once something was added to it, and once only vectors are left of the
        matrix: picked rows. Its gradient then is one of activations.
        """
        return self.is_sum or all(
            not (any(only_first) and any(only_second))
            for only_first, only_second in map(sides, self.terms)
        )


def sides(term: Term) -> tuple[list[bool], list[bool]]:
    """Returns where coordinates vary and the basis does not, and the reverse."""
    pairs = list(zip(varies(term.coordinates), varies(term.basis), strict=True))
    return [a and not b for a, b in pairs], [b and not a for a, b in pairs]


def varies(array: jax.Array) -> tuple[bool, ...]:
    """Returns along which atoms coordinates or a basis vary."""
    return tuple(size > 1 for size in array.shape[:-1])


def without_ones(array: jax.Array) -> jax.Array:
    """Returns coordinates or a basis with those atoms alone along which they vary."""
    return array.squeeze([i for i, size in enumerate(array.shape[:-1]) if size == 1])


def positions(dims: Dims) -> tuple[range, ...]:
    """Returns where the atoms of each dimension lie among all."""
    found, start = [], 0
    for dim in dims:
        found.append(range(start, start + len(dim)))
        start += len(dim)
    return tuple(found)


def atomic(array: jax.Array, dims: Dims) -> jax.Array:
    """Returns an array like one of ``dims``, or broadcast to it, as (*atoms, 1)."""
    shape = [
        size if n > 1 else 1
        for n, dim in zip(array.shape, dims, strict=True)
        for size in dim
    ]
    return array.reshape(*shape, 1)


def plain_term(array: jax.Array, dims: Dims) -> Term:
    """Returns the term of an array that is added: its gradient at its own size."""
    spread = atomic(array, dims)
    return Term(spread, jnp.ones((1,) * spread.ndim, array.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """What was computed of a parameter entry by entry, and is to be reduced.

    Attributes:
        value: The array.
        names: Key paths of the parameters.
        first: The operation that made entries of them.
    """

    value: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    first: str = dataclasses.field(metadata={"static": True})


def value_of(x: Any) -> Any:
    """Returns the array itself, without the gradient of a followed one."""
    return x.value if isinstance(x, (Followed, Entries)) else x


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TypeOf:
    """Shape, dtype, sharding and what an array varies over, which are no array."""

    like: jax.ShapeDtypeStruct

    @classmethod
    def array(cls, array: jax.Array) -> "TypeOf":
        """Returns the type of an array."""
        return cls(jax.eval_shape(lambda x: x, array))

    def shaped(self, array: jax.Array) -> jax.Array:
        """Returns an array of as many numbers in this shape and dtype."""
        return array.reshape(self.like.shape).astype(self.like.dtype)


class Refused(Exception):
    """Why a rule does not apply; :func:`unsupported` says it to the user.

    Args:
        why: Part of a sentence.
        inputs: Those that it does not apply to; none: all of the operation.
    """

    def __init__(self, why: str = "", *inputs: Any):
        super().__init__(why)
        self.why = why
        self.inputs = inputs


class UnsupportedError(ValueError):
    """A parameter is used where its projected gradient cannot be computed."""


def names_of(inputs: Iterable[Any]) -> tuple[str, ...]:
    """Returns the parameters that inputs are made of, each once."""
    found = (x.names for x in inputs if isinstance(x, (Followed, Entries)))
    return tuple(dict.fromkeys(name for names in found for name in names))


def unsupported(
    equation: core.JaxprEqn, inputs: Sequence[Any], why: str = ""
) -> UnsupportedError:
    """Returns the error that names the parameter, the operation and ways out."""
    names = names_of(inputs)
    how = next((x.first for x in inputs if isinstance(x, Entries)), None)
    by = f"entry by entry, by {how}, and then " if how else ""
    return UnsupportedError(
        f"{' and '.join(names)} is used {by}by {equation.primitive.name}"
        f"{why and ', ' + why}, where its projected gradient cannot be computed "
        "without its full one. Use it in products (jnp.dot, @, einsum, dot_general), "
        "in lookups or in penalties, or give it its full gradient: "
        f"full_gradients={names}."
    )
