"""A projected parameter on its way through a traced program."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lowrank_optax.gradients.layout import Dims


class Term(NamedTuple):
    """A change of an array: sum_r coordinates * basis, broadcast.

    Both arrays have one axis per atom, of the atom's size or of size 1, and the rank.

    Attributes:
        coordinates: (*atoms, r). Only the gradient of the coordinates counts.
        basis: (*atoms, r).
    """

    coordinates: Any
    basis: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Followed:
    """An array made of projected parameters, inside a program.

    Attributes:
        value: The array. Its gradient goes to the coordinates alone.
        terms: One term for each parameter, and for each added or multiplied array.
        dims: Atoms of each dimension of ``value``.
        names: Key paths of the parameters, for errors.
        is_sum: Whether the array is a sum with an array other than a parameter.
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
        """Returns the same with changed coordinates and bases, but the old value."""
        terms = tuple(Term(change(term[0]), change(term[1])) for term in self.terms)
        return dataclasses.replace(self, terms=terms, dims=dims)

    def of(self, value: jax.Array) -> "Followed":
        """Returns the same with another value."""
        return dataclasses.replace(self, value=value)

    def without_arrays(self) -> "Followed":
        """Returns the same with None in place of all arrays."""
        return jax.tree.map(lambda _: None, self)

    @property
    def is_free(self) -> bool:
        """Whether any operation is allowed, as on activations.

        This holds for a sum with an activation, and for vectors of a matrix, as
        looked-up rows. Their gradients are those of activations.
        """
        return self.is_sum or all(
            not (any(only_first) and any(only_second))
            for only_first, only_second in map(sides, self.terms)
        )


def sides(term: Term) -> tuple[list[bool], list[bool]]:
    """Returns where coordinates alone vary, by atom, and where the basis alone does."""
    pairs = list(zip(varies(term.coordinates), varies(term.basis), strict=True))
    return [a and not b for a, b in pairs], [b and not a for a, b in pairs]


def varies(array: jax.Array) -> tuple[bool, ...]:
    """Returns, for each atom, whether coordinates or a basis vary along it."""
    return tuple(size > 1 for size in array.shape[:-1])


def without_ones(array: jax.Array) -> jax.Array:
    """Returns coordinates or a basis without the atoms of size 1."""
    return array.squeeze([i for i, size in enumerate(array.shape[:-1]) if size == 1])


def positions(dims: Dims) -> tuple[range, ...]:
    """Returns the positions of each dimension's atoms among all atoms."""
    found, start = [], 0
    for dim in dims:
        found.append(range(start, start + len(dim)))
        start += len(dim)
    return tuple(found)


def atomic(array: jax.Array, dims: Dims) -> jax.Array:
    """Returns an array with these dimensions, or size 1 in some, as (*atoms, 1)."""
    shape = [
        size if n > 1 else 1
        for n, dim in zip(array.shape, dims, strict=True)
        for size in dim
    ]
    return array.reshape(*shape, 1)


def plain_term(array: jax.Array, dims: Dims) -> Term:
    """Returns the term of an added array, whose gradient has the array's own size."""
    spread = atomic(array, dims)
    return Term(spread, jnp.ones((1,) * spread.ndim, array.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """A function of a parameter's entries, to be reduced later.

    Attributes:
        value: The array.
        names: Key paths of the parameters.
        first: The first operation on the entries.
    """

    value: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    first: str = dataclasses.field(metadata={"static": True})


def value_of(x: Any) -> Any:
    """Returns the plain array; a followed array loses its gradient."""
    return x.value if isinstance(x, (Followed, Entries)) else x


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TypeOf:
    """Shape, dtype, sharding and varying mesh axes of an array, as static data."""

    like: jax.ShapeDtypeStruct

    @classmethod
    def array(cls, array: jax.Array) -> "TypeOf":
        """Returns the type of an array."""
        return cls(jax.eval_shape(lambda x: x, array))

    def shaped(self, array: jax.Array) -> jax.Array:
        """Returns an array of the same size in this shape and dtype."""
        return array.reshape(self.like.shape).astype(self.like.dtype)


class Refused(Exception):
    """The reason why a rule does not apply; :func:`unsupported` tells the user.

    Args:
        why: Part of a sentence.
        inputs: The inputs with this reason. Without inputs: all inputs of the
            operation.
    """

    def __init__(self, why: str = "", *inputs: Any):
        super().__init__(why)
        self.why = why
        self.inputs = inputs


class UnsupportedError(ValueError):
    """A parameter is used where its projected gradient cannot be computed."""


def names_of(inputs: Iterable[Any]) -> tuple[str, ...]:
    """Returns the names of the parameters in the inputs, each once."""
    found = (x.names for x in inputs if isinstance(x, (Followed, Entries)))
    return tuple(dict.fromkeys(name for names in found for name in names))


def unsupported(
    equation: core.JaxprEqn, inputs: Sequence[Any], why: str = ""
) -> UnsupportedError:
    """Returns the error with the parameter's name, the operation and the ways out."""
    names = names_of(inputs)
    how = next((x.first for x in inputs if isinstance(x, Entries)), None)
    by = f"entry by entry, by {how}, and then " if how else ""
    verb = "are" if len(names) > 1 else "is"
    return UnsupportedError(
        f"{' and '.join(names)} {verb} used {by}by {equation.primitive.name}"
        f"{why and ', ' + why}, where the projected gradient cannot be computed "
        "without the full gradient. Use the parameter in products (jnp.dot, @, einsum, "
        "dot_general), in lookups or in penalties, or ask for the full gradient: "
        f"full_gradients={names}."
    )
