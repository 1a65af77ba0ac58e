"""A projected parameter on its way through a traced program."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from lowrank_optax.gradients.axes import Dims, dims_of
from lowrank_optax.matrix.view import MatrixView


@dataclasses.dataclass(frozen=True)
class Followed:
    """What has become of a parameter that is projected.

    Attributes:
        name: Key path of the parameter, for errors.
        view: The parameter as matrices.
        dims: What each dimension of ``value`` consists of.
        stack: Axes of the parameter's stack that are left, in the order of the leading
            axes of the two next.
        value: The array.
        coordinates: (*stack, a*c, r), zeros, whose gradient is asked for.
        basis: (*stack, b/c, r).
    """

    name: str
    view: MatrixView
    dims: Dims
    stack: tuple[int, ...]
    value: jax.Array
    coordinates: jax.Array
    basis: jax.Array

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns value, coordinates and basis."""
        return self.value, self.coordinates, self.basis

    def of(self, arrays: Sequence[jax.Array]) -> "Followed":
        """Returns the same with other arrays, of the same shapes."""
        value, coordinates, basis = arrays
        return dataclasses.replace(
            self, value=value, coordinates=coordinates, basis=basis
        )


class UnsupportedError(ValueError):
    """A parameter is used where its projected gradient cannot be computed."""


def follow(
    name: str,
    view: MatrixView,
    value: jax.Array,
    coordinates: jax.Array,
    basis: jax.Array,
) -> Followed:
    """Returns a parameter to be followed."""
    dims = dims_of(tuple(value.shape))
    return Followed(name, view, dims, view.stack_axes, value, coordinates, basis)


def unsupported(
    equation: core.JaxprEqn, inputs: Sequence[Any], why: str = ""
) -> UnsupportedError:
    """Returns the error that names the parameter and the operation."""
    name = next(x.name for x in inputs if isinstance(x, Followed))
    return UnsupportedError(
        f"{name} is used by {equation.primitive.name}{why and ', ' + why}, where its "
        "projected gradient cannot be computed without its full one; leave it out with "
        "full_gradients=..., or use it in a product (jnp.dot, @, einsum, dot_general) "
        "or as an embedding."
    )
