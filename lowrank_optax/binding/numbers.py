"""The numbers of an optimizer that its ``init`` computes while it is traced.

``optax.inject_hyperparams`` makes each number an array inside ``init``. In a trace that
is an array of this trace, and means nothing behind it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from lowrank_optax.equations import bound


def traced_numbers(part: Any) -> list[Tracer]:
    """Returns what :func:`replaced` replaces, in its order."""
    found: list[Tracer] = []

    def same(tracer: Tracer) -> Tracer:
        found.append(tracer)
        return tracer

    replaced(part, same)
    return found


def replaced(part: Any, new: Callable[[Tracer], Any]) -> Any:
    """Returns records, tuples, mappings and partials with other values for tracers."""
    if isinstance(part, Tracer):
        return new(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {x.name: getattr(part, x.name) for x in dataclasses.fields(part)}
        changed = {name: replaced(value, new) for name, value in fields.items()}
        if all(changed[name] is value for name, value in fields.items()):
            return part
        return dataclasses.replace(part, **changed)
    if isinstance(part, functools.partial):
        args = [replaced(value, new) for value in part.args]
        keywords = {name: replaced(x, new) for name, x in part.keywords.items()}
        return functools.partial(part.func, *args, **keywords)
    if isinstance(part, Mapping):
        return {name: replaced(value, new) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        values = [replaced(value, new) for value in part]
        is_record = hasattr(part, "_fields")
        return type(part)(*values) if is_record else type(part)(values)
    return part


def computed(program: core.ClosedJaxpr) -> list[Any]:
    """Returns the results of a program that do not depend on its arguments.

    Results are numbers of NumPy. Where the program uses arrays of an outer trace, they
    are arrays of that trace.

    Raises:
        TypeError: If one depends on the arguments.
    """
    jaxpr = program.jaxpr
    needed = {x for x in jaxpr.outvars if isinstance(x, core.Var)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            equations.append(equation)
            needed |= {x for x in equation.invars if isinstance(x, core.Var)}
    if needed.intersection(jaxpr.invars):
        raise TypeError(
            "a number of the optimizer depends on the parameters; give numbers that "
            "are known without them."
        )
    is_inner = any(isinstance(x, Tracer) for x in program.consts)
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    with contextlib.nullcontext() if is_inner else jax.ensure_compile_time_eval():
        for equation in reversed(equations):
            results = bound(equation, list(map(read, equation.invars)))
            values |= zip(equation.outvars, results, strict=True)
        found = list(map(read, jaxpr.outvars))
    return [x if isinstance(x, Tracer) else np.asarray(x)[()] for x in found]
