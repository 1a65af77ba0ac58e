"""FOAM: Adam whose moments are folded: one number for some neighbours."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType


class ScaleByFoamState(NamedTuple):
    """State of :func:`scale_by_foam`.

    Attributes:
        count: Number of updates done.
        mu: Averages of folded gradients, a tree like the parameters.
        nu: Averages of their squares.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_foam(
    level: int = 2, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Adam with moments of folded gradients, and what the fold leaves out.

    G_t (n, m) is the gradient of a kernel of n inputs and m outputs. F takes the mean
    of each 2^l inputs that follow each other, and F' repeats each mean 2^l times:

    .. math::
        M_t = \beta_1 M_{t-1} + (1 - \beta_1) F G_t, \quad
        V_t = \beta_2 V_{t-1} + (1 - \beta_2) (F G_t)^2, \quad
        E_t = G_t - F' F G_t

    .. math::
        U_t = \frac{F' \hat M_t + E_t}{\sqrt{F' \hat V_t + E_t^2} + \epsilon}, \quad
        \hat M_t = \frac{M_t}{1 - \beta_1^t}, \quad
        \hat V_t = \frac{V_t}{1 - \beta_2^t}

    Matrices of a stack are treated one by one. State: 2 n m / 2^l numbers a matrix, in
    the dtype of the parameters. Level 0 is Adam.

    Args:
        level: l, >= 0. A leaf has the largest level up to it whose 2^l divides n. A
            vector has level 0.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.

    References:
        Wen et al., `FOAM <https://arxiv.org/abs/2512.07112>`_, 2025. There too the
        inputs are folded: they are the last axis of a PyTorch weight. The paper has no
        bias correction. Here the moments have Adam's, and E has none, because it is of
        the last gradient alone. The authors' code has the means of squares,
        :math:`F (G_t^2)`, in the place of :math:`(F G_t)^2`, corrects the bias of the
        whole update, E included, and fills up inputs that 2^l does not divide with
        zeros.
    """

    def init(params: Any) -> ScaleByFoamState:
        def zeros(leaf):
            return jnp.zeros(_split(leaf.shape, level)[0], leaf.dtype)

        mu, nu = (jax.tree.map(zeros, params) for _ in range(2))
        return ScaleByFoamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))

        def step(updates, mu, nu, count):
            means = jax.tree.map(lambda g: _folded(g, level), updates)
            mu = optax.tree.update_moment(means, mu, b1, 1)
            nu = optax.tree.update_moment(means, nu, b2, 2)

            def of_leaf(g, mean, m, v):
                rest = g - _unfolded(mean, g.shape)
                first = _unfolded(m, g.shape) + rest
                return first / (jnp.sqrt(_unfolded(v, g.shape) + rest**2) + eps)

            first, second = (
                optax.tree.bias_correction(moment, decay, count)
                for moment, decay in ((mu, b1), (nu, b2))
            )
            return jax.tree.map(of_leaf, updates, means, first, second), mu, nu

        trees = updates, state.mu, state.nu
        scaled, mu, nu = _in_automatic_axes(step, trees, *trees, count)
        return scaled, ScaleByFoamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _in_automatic_axes(function: Any, like: Any, *args: Any) -> Any:
    """Returns function(*args), whose results have the shardings of ``like``.

    Under a mesh's explicit axes, a reshape refuses neighbours on different devices.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    meshes = (x.mesh for x in jax.tree.leaves(shardings))
    if all(AxisType.Explicit not in mesh.axis_types for mesh in meshes):
        return function(*args)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def _split(shape: tuple[int, ...], level: int) -> tuple[tuple[int, ...], int]:
    """Returns the shape of a folded leaf, and the number of neighbours in one."""
    if len(shape) < 2:
        return shape, 1
    *stack, n, m = shape
    # The lowest bit of n is the largest power of two that divides it.
    size = 1 << min(level, (n & -n).bit_length() - 1)
    return (*stack, n // size, m), size


def _folded(leaf: jax.Array, level: int) -> jax.Array:
    (*stack, m), size = _split(leaf.shape, level)
    if size == 1:
        return leaf
    return jnp.mean(leaf.reshape(*stack, size, m), axis=-2)


def _unfolded(folded: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if folded.shape == shape:
        return folded
    return jnp.repeat(folded, shape[-2] // folded.shape[-2], axis=-2)
