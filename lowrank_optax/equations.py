"""Single operations of a traced program."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core


def bound(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the results of an unchanged operation."""
    primitive = equation.primitive
    with equation.ctx.manager:
        params = primitive.get_bind_params(equation.params)
        output = primitive.bind(*inputs, **params)
    return list(output) if primitive.multiple_results else [output]


def has_derivative(equation: core.JaxprEqn) -> bool:
    """Returns whether any result is differentiable. Integers are not."""
    types = [variable.aval for variable in equation.outvars]
    return any(jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact) for x in types)


def as_tuples(value: Any) -> Any:
    """Returns dimension numbers as nested tuples, for comparisons."""
    return tuple(map(as_tuples, value)) if isinstance(value, (tuple, list)) else value
