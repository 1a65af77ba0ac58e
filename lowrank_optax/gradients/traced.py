"""A function of parameters as a program, with its other arguments untraced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


def traced(
    function: Callable[..., Any],
    has_aux: bool,
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[core.ClosedJaxpr, Callable[[Sequence[Any]], Any]]:
    """Returns a function's program, with the function's value as its first result.

    Only the parameters are traced. Other arguments reach the function untouched, and
    entries of aux other than arrays come out unchanged.

    Args:
        function: (params, ...) -> scalar, or (scalar, aux).
        has_aux: Whether the function returns aux too.
        params: The parameters.
        args: Other positional arguments of the function.
        kwargs: Keyword arguments of the function.

    Returns:
        The program, and a function from its other results to aux.

    Raises:
        TypeError: If the function returns neither a scalar nor (scalar, aux).
    """
    returned: dict[str, Any] = {}

    def run(params):
        found = function(params, *args, **kwargs)
        if has_aux and not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                f"the function must return (scalar, aux), as has_aux=True says, not "
                f"{type(found).__name__}."
            )
        value, aux = found if has_aux else (found, None)
        leaves, returned["tree"] = jax.tree.flatten(aux)
        arrays = [isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves]
        returned["others"] = [
            (is_array, None if is_array else leaf)
            for is_array, leaf in zip(arrays, leaves, strict=True)
        ]
        kept = [x for x, is_array in zip(leaves, arrays, strict=True) if is_array]
        return value, kept

    program, (value, _) = jax.make_jaxpr(run, return_shape=True)(params)
    if not hasattr(value, "shape") or value.shape != ():
        raise TypeError(
            f"the function must return a scalar, not {jax.tree.map(str, value)}."
        )

    def aux(results: Sequence[Any]) -> Any:
        left = iter(results)
        leaves = [
            next(left) if is_array else leaf for is_array, leaf in returned["others"]
        ]
        return jax.tree.unflatten(returned["tree"], leaves)

    return program, aux
