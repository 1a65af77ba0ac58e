"""Decompositions of stacks of small matrices, without a deadlock on CPUs.

jaxlib 0.10.0 to 0.11.0 cut a batched LAPACK call into pieces and queue the pieces for
the thread pool of the program. The call holds a thread of this pool until all pieces
are done. Two such calls at once, from two simulated devices or within one program, can
hold all threads, so that no thread is left for the pieces. A call with one matrix is
never cut.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def one_by_one(decompose: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Returns decompose(*stacks), one matrix at a time on a CPU, batched elsewhere.

    Args:
        decompose: Function of stacks of matrices, (*stack, n, m) each. It must treat
            the stack matrix by matrix.
        stacks: Arguments of the function, with the same stack.
    """
    stack = stacks[0].shape[:-2]
    if math.prod(stack) <= 1 or _platform() != "cpu":
        return decompose(*stacks)
    flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in stacks)
    found = jax.lax.map(lambda matrices: decompose(*matrices), flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


def _platform() -> str:
    """Returns the platform of the program that is being traced."""
    # jax.lax.platform_dependent would leave conditionals in the program.
    device = getattr(jax.config, "jax_default_device")  # noqa: B009
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
