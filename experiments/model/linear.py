"""Products with kernels, one of which may be a frozen matrix and its adapter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """W + down up, never added up. It takes an array's place in a parameter.

    Attributes:
        frozen: W, (*stack, n, m).
        down: (*stack, n, r).
        up: (*stack, r, m).
    """

    frozen: jax.Array
    down: jax.Array
    up: jax.Array

    def __getitem__(self, index: Any) -> "Adapted":
        """Returns itself: a parameter's value is what its ``[...]`` gives."""
        assert index is Ellipsis
        return self


class Linear(nnx.Linear):
    """Flax' layer, (..., n) to (..., m), whose kernel may be :class:`Adapted`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs.astype(self.dtype)
        y = linear(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def linear(x: jax.Array, kernel: jax.Array | Adapted, dtype: Any = None) -> jax.Array:
    """(..., n) by (n, m) in x's dtype, accumulated and returned in ``dtype`` or x's."""
    # x is one matrix here. For a (B, T, n) operand XLA's CPU backend transposes the
    # cotangent in every kernel's gradient, which takes a fifth of a training step.
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, Adapted):
        y = _dot(flat, jax.lax.stop_gradient(kernel.frozen), dtype)
        y += _recomputed(_dot(flat, kernel.down), kernel.up, dtype)
    else:
        y = _dot(flat, kernel, dtype)
    return y.reshape(*x.shape[:-1], -1)


def _dot(x, kernel, dtype=None):
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _recomputed(x, kernel, dtype):
    """A product as of :func:`_dot` that is computed again in the backward pass.

    The models' policies keep the outputs of products without a batch axis. Both parts
    of a sum would take twice the memory of one.
    """
    return jax.lax.dot_general(
        x[None],
        kernel.astype(x.dtype)[None],
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=dtype,
    )[0]
