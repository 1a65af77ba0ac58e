"""Decompositions of stacks of small matrices, which on a CPU never wait for each other.

jaxlib 0.10.0 to 0.11.0 cut a batched LAPACK call in pieces, queue them for the pool of
threads that they run on, and hold a thread of it until all pieces are done. Two such
calls at once, of two simulated devices or of one program, can hold all threads, and
then nobody is left to do the pieces. A call of one matrix is never cut.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def one_by_one(decompose: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Returns decompose(*stacks): on a CPU of one matrix at a time, elsewhere of all.

    Args:
        decompose: Function of stacks of matrices, (*stack, n, m) each, that treats them
            matrix by matrix.
        stacks: Its arguments, with the same stack.
    """
    stack = stacks[0].shape[:-2]
    if math.prod(stack) <= 1 or _platform() != "cpu":
        return decompose(*stacks)
    flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in stacks)
    found = jax.lax.map(lambda matrices: decompose(*matrices), flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


def _platform() -> str:
    """Returns what a program that is traced now is going to run on."""
    # Not jax.lax.platform_dependent: it leaves conditionals in the program.
    device = getattr(jax.config, "jax_default_device")  # noqa: B009
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
