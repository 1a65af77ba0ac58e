"""Evaluates a traced program with other rules for followed parameters.

The evaluation follows parameters through scans, checkpoints, conditionals and jitted
functions to the operations on them. :mod:`lowrank_optax.gradients.uses` has the rules
of these operations.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from lowrank_optax.equations import bound, has_derivative
from lowrank_optax.gradients.followed import (
    Entries,
    Followed,
    Refused,
    UnsupportedError,
    unsupported,
    value_of,
)
from lowrank_optax.gradients.full_size import entry_by_entry, plain
from lowrank_optax.gradients.moves import leading
from lowrank_optax.gradients.uses import USES


def evaluate(jaxpr: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Returns the results of a traced program.

    Args:
        jaxpr: The program. Only its first result is differentiated.
        arguments: Arrays, with :class:`Followed` in place of some.

    Raises:
        UnsupportedError: If an operation on a followed parameter has no rule, or if a
            followed parameter is the first result.
    """
    first, *others = _evaluate(jaxpr.jaxpr, jaxpr.consts, arguments)
    if isinstance(first, Followed) and not first.is_free:
        raise UnsupportedError(
            f"{first.names[0]} itself is the result of the function, not a loss made "
            "from it."
        )
    return [plain(first), *map(value_of, others)]


def _evaluate(jaxpr: core.Jaxpr, consts, arguments) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if any(isinstance(x, (Followed, Entries)) for x in inputs):
            outputs, used = _used(equation, inputs)
            for atom, before, after in zip(equation.invars, inputs, used, strict=True):
                # An array made plain stays plain for all uses: one full gradient.
                if before is not after:
                    values[atom] = after
        else:
            outputs = bound(equation, inputs)
        for variable, output in zip(equation.outvars, outputs, strict=True):
            values[variable] = output
    return [read(atom) for atom in jaxpr.outvars]


def _used(equation: core.JaxprEqn, inputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the results of an operation on followed parameters, and the inputs.

    Without a rule, an input that counts as an activation becomes a plain array.
    """
    name = equation.primitive.name
    if name == "stop_gradient" or not has_derivative(equation):
        values = [value_of(x) for x in inputs]
        return bound(equation, jax.lax.stop_gradient(values)), inputs
    reason = Refused()
    if not any(isinstance(x, Entries) for x in inputs) or name in _PROGRAMS:
        rule = _PROGRAMS.get(name) or USES.get(name)
        try:
            if rule is not None:
                with equation.ctx.manager:
                    return rule(equation, inputs), inputs
        except Refused as refused:
            reason = refused
    freed = [plain(x) if isinstance(x, Followed) and x.is_free else x for x in inputs]
    if any(x is not y for x, y in zip(inputs, freed, strict=True)):
        if any(isinstance(x, (Followed, Entries)) for x in freed):
            return _used(equation, freed)[0], freed
        return bound(equation, freed), freed
    try:
        return entry_by_entry(equation, inputs), inputs
    except Refused:
        # The others could be used so.
        changed = [x for x in inputs if isinstance(x, Entries)]
        culprits = changed or reason.inputs or inputs
        raise unsupported(equation, culprits, reason.why) from None


def _jit(equation, inputs) -> list[Any]:
    closed = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
    return _evaluate(closed.jaxpr, closed.consts, inputs)


def _checkpoint(equation, inputs) -> list[Any]:
    params = equation.params
    passed: dict[int, int] = {}

    def body(*inner):
        results = _evaluate(params["jaxpr"], (), inner)
        return _without_passed(results, inner, passed)

    again = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return _with_passed(again(*inputs), passed, inputs)


def _without_passed(results, inner, passed: dict[int, int]) -> list[Any]:
    """Returns the results without the parameters that only pass through.

    Flax returns a module's parameters from each transformed call of the module.

    Args:
        results: Results of a program.
        inner: Arguments of the program.
        passed: Filled with position of a result -> position of the argument.
    """
    for i, result in enumerate(results):
        same = [j for j, x in enumerate(inner) if x is result]
        if isinstance(result, Followed) and same:
            passed[i] = same[0]
    return [x for i, x in enumerate(results) if i not in passed]


def _with_passed(results, passed: dict[int, int], inputs) -> list[Any]:
    """Returns the results with the parameters that passed through."""
    plain = iter(results)
    count = len(results) + len(passed)
    return [inputs[passed[i]] if i in passed else next(plain) for i in range(count)]


def _returned(results: list[Any]) -> list[Any]:
    """Returns the results of a part of the program as plain arrays, or refuses."""
    found = [plain(x) if isinstance(x, Followed) and x.is_free else x for x in results]
    if any(isinstance(x, (Followed, Entries)) for x in found):
        raise Refused("which returns it", *found)
    return found


def _cond(equation, inputs) -> list[Any]:
    index, *operands = inputs
    if isinstance(index, Followed):
        raise Refused("as the index of a branch", index)

    def branch(closed):
        return lambda *inner: _returned(_evaluate(closed.jaxpr, closed.consts, inner))

    branches = [branch(closed) for closed in equation.params["branches"]]
    return list(jax.lax.switch(index, branches, *operands))


def _while(equation, inputs) -> list[Any]:
    """A loop without a reverse mode: JAX raises, if a derivative needs the loop."""
    return bound(equation, [plain(x) for x in inputs])


def _scan(equation, inputs) -> list[Any]:
    params = equation.params
    consts, carry, over = _scan_inputs(params, inputs)
    carry = [plain(x) if isinstance(x, Followed) and x.is_free else x for x in carry]
    if any(isinstance(x, (Followed, Entries)) for x in carry):
        raise Refused("as a carried value", *carry)
    scanned = [leading(x) if isinstance(x, Followed) else (x, None) for x in over]
    closed = params["jaxpr"]
    passed: dict[int, int] = {}

    def body(carry, arrays):
        rows = [
            step(row) if step else row
            for row, (_, step) in zip(arrays, scanned, strict=True)
        ]
        results = _evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *rows])
        others = _without_passed(results[len(carry) :], rows, passed)
        return _returned(results[: len(carry)]), _returned(others)

    carry, outputs = jax.lax.scan(
        body,
        carry,
        [x for x, _ in scanned],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *_with_passed(outputs, passed, over)]


def _scan_inputs(params, inputs: list[Any]) -> tuple[list[Any], ...]:
    """Returns a scan's constants, its carried values, and its scanned arrays."""
    if "num_consts" in params:  # jax before 0.11
        first, second = params["num_consts"], params["num_carry"]
        return inputs[:first], inputs[first : first + second], inputs[first + second :]
    consts, carry, _ = (len(list(tree)) for tree in params["ft_in"].unpack())
    return inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]


_PROGRAMS = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _jit,
    "core_call": _jit,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
