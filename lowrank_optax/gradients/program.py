"""A traced program evaluated again, with other products in the place of some.

Follows chosen parameters through scans, checkpoints, conditionals and jitted functions
to the operations that use them, which :mod:`lowrank_optax.gradients.uses` treats.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lowrank_optax.gradients.followed import Followed, UnsupportedError, unsupported
from lowrank_optax.gradients.uses import USES, bound, stack_place


def evaluate(jaxpr: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Returns the results of a traced program.

    Args:
        jaxpr: The program.
        arguments: Arrays, or :class:`Followed` in the place of some.

    Raises:
        UnsupportedError: If a followed parameter is used otherwise than in a product,
            or is returned.
    """
    results = _evaluate(jaxpr.jaxpr, jaxpr.consts, arguments)
    for result in results:
        if isinstance(result, Followed):
            raise UnsupportedError(f"{result.name} is a result of the function itself.")
    return results


def _evaluate(jaxpr: core.Jaxpr, consts, arguments) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if any(isinstance(x, Followed) for x in inputs):
            outputs = _followed(equation, inputs)
        else:
            outputs = bound(equation, inputs)
        for variable, output in zip(equation.outvars, outputs, strict=True):
            values[variable] = output
    return [read(atom) for atom in jaxpr.outvars]


def _followed(equation: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    """Returns the results of an operation on a followed parameter."""
    rule = _RULES.get(equation.primitive.name)
    if rule is None:
        raise unsupported(equation, inputs)
    return rule(equation, inputs)


def _jit(equation, inputs) -> list[Any]:
    closed = equation.params["jaxpr"]
    return _evaluate(closed.jaxpr, closed.consts, inputs)


def _flattened(inputs: Sequence[Any]) -> tuple[list[jax.Array], Callable]:
    """Returns all arrays of the inputs, and how to put them together again."""
    counts = [3 if isinstance(x, Followed) else 1 for x in inputs]

    def rebuilt(arrays: Sequence[jax.Array]) -> list[Any]:
        arrays, found = list(arrays), []
        for like, count in zip(inputs, counts, strict=True):
            taken, arrays = arrays[:count], arrays[count:]
            found.append(like.of(taken) if count == 3 else taken[0])
        return found

    flat = [
        y for x in inputs for y in (x.arrays() if isinstance(x, Followed) else (x,))
    ]
    return flat, rebuilt


def _checkpoint(equation, inputs) -> list[Any]:
    flat, rebuilt = _flattened(inputs)
    params = equation.params

    passed: dict[int, int] = {}

    def body(*arrays):
        inner = rebuilt(arrays)
        results = _evaluate(params["jaxpr"], (), inner)
        return _without_passed(equation, results, inner, passed)

    again = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return _with_passed(again(*flat), passed, inputs)


def _without_passed(equation, results, inner, passed: dict[int, int]) -> list[Any]:
    """Returns the results without the parameters that only pass through.

    Flax returns a module's parameters from each transformed call of it.

    Args:
        equation: With a program of its own.
        results: Of that program.
        inner: Its arguments.
        passed: Filled with result -> argument, by position.
    """
    for i, result in enumerate(results):
        if not isinstance(result, Followed):
            continue
        same = [j for j, x in enumerate(inner) if x is result]
        if not same:
            raise unsupported(equation, [result], "which returns it changed")
        passed[i] = same[0]
    return [x for i, x in enumerate(results) if i not in passed]


def _with_passed(results, passed: dict[int, int], inputs) -> list[Any]:
    """Returns the results with the parameters that passed through."""
    plain = iter(results)
    count = len(results) + len(passed)
    return [inputs[passed[i]] if i in passed else next(plain) for i in range(count)]


def _plain(equation, results: list[Any]) -> list[Any]:
    if any(isinstance(x, Followed) for x in results):
        raise unsupported(equation, results, "which returns it")
    return results


def _cond(equation, inputs) -> list[Any]:
    index, *operands = inputs
    if isinstance(index, Followed):
        raise unsupported(equation, inputs)
    flat, rebuilt = _flattened(operands)

    def branch(closed):
        def run(*arrays):
            found = _evaluate(closed.jaxpr, closed.consts, rebuilt(arrays))
            return _plain(equation, found)

        return run

    branches = [branch(closed) for closed in equation.params["branches"]]
    return list(jax.lax.switch(index, branches, *flat))


def _scan(equation, inputs) -> list[Any]:
    params = equation.params
    consts, carry, over = _scan_inputs(params, inputs)
    n_carry = len(carry)
    scanned = [_leading(equation, x) for x in over]
    if any(isinstance(x, Followed) for x in carry):
        raise unsupported(equation, carry, "as a value that is carried on")
    flat, rebuilt = _flattened([x[0] for x in scanned])
    inner = [x[1] for x in scanned]
    closed = params["jaxpr"]
    passed: dict[int, int] = {}

    def body(carry, arrays):
        rows = [
            like.of(row.arrays()) if isinstance(like, Followed) else row
            for like, row in zip(inner, rebuilt(arrays), strict=True)
        ]
        results = _evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *rows])
        carry = _plain(equation, results[:n_carry])
        return carry, _without_passed(equation, results[n_carry:], rows, passed)

    carry, outputs = jax.lax.scan(
        body,
        carry,
        flat,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *_with_passed(outputs, passed, over)]


def _scan_inputs(params, inputs: list[Any]) -> tuple[list[Any], ...]:
    """Returns a scan's constants, what it carries, and what it runs over."""
    if "num_consts" in params:  # jax before 0.11
        first, second = params["num_consts"], params["num_carry"]
        return inputs[:first], inputs[first : first + second], inputs[first + second :]
    consts, carry, _ = (len(list(tree)) for tree in params["ft_in"].unpack())
    return inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]


def _leading(equation, x) -> tuple[Any, Any]:
    """Returns what a scan runs over, and what one step of it sees."""
    if not isinstance(x, Followed):
        return x, None
    place = stack_place(x, 0)
    if place is None:
        raise unsupported(equation, [x], "over another axis than its stack")
    moved = dataclasses.replace(
        x,
        coordinates=jnp.moveaxis(x.coordinates, place, 0),
        basis=jnp.moveaxis(x.basis, place, 0),
    )
    stack = tuple(axis for i, axis in enumerate(x.stack) if i != place)
    return moved, dataclasses.replace(x, dims=x.dims[1:], stack=stack)


_RULES = {
    **USES,
    "jit": _jit,
    "remat2": _checkpoint,
    "cond": _cond,
    "scan": _scan,
}
