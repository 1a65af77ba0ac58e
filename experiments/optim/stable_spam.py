"""Stable-SPAM: Adam on gradients without spikes, its moments reset now and then."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScaleByStableSpamState(NamedTuple):
    """State of :func:`scale_by_stable_spam`.

    The averages are trees like the parameters, with a number for each matrix, float32
    or wider.

    Attributes:
        count: Number of updates done.
        largest: Averages of the largest entries.
        norm: Averages of the norms.
        square: Averages of the squares of the norms.
        adam: State of ``optax.scale_by_adam``. Its counter starts again at a reset.
    """

    count: jax.Array
    largest: Any
    norm: Any
    square: Any
    adam: Any


def scale_by_stable_spam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    reset_every: int | None = 500,
    largest_decay: float = 0.999,
    norm_decay: float = 0.7,
    square_decay: float = 0.9,
) -> optax.GradientTransformation:
    r"""Adam on gradients that are clipped and scaled by their past.

    G_t is the gradient of a matrix, at update t = 1, 2, ... A hat divides an average
    with decay gamma by 1 - gamma^t. AdaClip brings entries above an average of the
    largest ones down to it:

    .. math::
        x_t = \max_{ij} |G_{t,ij}|, \quad
        T_t = \gamma_3 T_{t-1} + (1 - \gamma_3) x_t, \quad
        C_{t,ij} = \begin{cases}
            G_{t,ij} \hat T_t / x_t & |G_{t,ij}| > \hat T_t \\
            G_{t,ij} & \text{otherwise}
        \end{cases}

    AdaGN gives the whole matrix a norm that follows from its past:

    .. math::
        m_t = \gamma_1 m_{t-1} + (1 - \gamma_1) \|C_t\|_F, \quad
        v_t = \gamma_2 v_{t-1} + (1 - \gamma_2) \|C_t\|_F^2, \quad
        N_t = \frac{C_t}{\|C_t\|_F} \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    A zero gradient stays zero. Adam follows on N_t. MoRet sets Adam's moments and its
    counter to zero before each update t that ``reset_every`` divides. The averages
    above run on.

    A matrix is the last two axes of a leaf. Matrices of a stack are treated one by one,
    and a vector as a whole. State: Adam's, and three numbers a matrix.

    Args:
        b1: Decay of Adam's first moment.
        b2: Decay of Adam's second moment.
        eps: Added to the root of the second moment, and to that of v.
        reset_every: Updates between two resets; >= 0. None or 0: there are none.
        largest_decay: gamma_3, of the largest entries.
        norm_decay: gamma_1, of the norms.
        square_decay: gamma_2, of the squares of the norms.

    References:
        Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025. The
        decays are those of the authors' code. That code has one counter for Adam and
        the hats, so that its threshold is loose for some steps after a reset; here the
        hats count all updates. Its decay of beta_1 and gamma_1 over the run, off by
        default, is left out.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> ScaleByStableSpamState:
        largest, norm, square = (jax.tree.map(_zeros, params) for _ in range(3))
        count = jnp.zeros([], jnp.int32)
        return ScaleByStableSpamState(count, largest, norm, square, adam.init(params))

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))

        def averaged(decay, values, averages):
            new = jax.tree.map(
                lambda x, old: decay * old + (1 - decay) * x, values, averages
            )
            return new, jax.tree.map(lambda x: x / (1 - decay**count), new)

        tops = jax.tree.map(lambda g: _over(jnp.max, jnp.abs(g)), updates)
        largest, thresholds = averaged(largest_decay, tops, state.largest)
        clipped = jax.tree.map(_clipped, updates, tops, thresholds)
        sizes = jax.tree.map(lambda c: jnp.sqrt(_over(jnp.sum, c**2)), clipped)
        norm, means = averaged(norm_decay, sizes, state.norm)
        squares = jax.tree.map(jnp.square, sizes)
        square, mean_squares = averaged(square_decay, squares, state.square)

        def of_leaf(grad, clipped, size, mean, mean_square):
            unit = clipped / jnp.where(size > 0, size, 1)
            return (unit * (mean / (jnp.sqrt(mean_square) + eps))).astype(grad.dtype)

        scaled = jax.tree.map(of_leaf, updates, clipped, sizes, means, mean_squares)
        before = state.adam
        if reset_every:
            kept = count % reset_every != 0
            before = jax.tree.map(
                lambda x: jnp.where(kept, x, jnp.zeros_like(x)), before
            )
        scaled, after = adam.update(scaled, before)
        return scaled, ScaleByStableSpamState(count, largest, norm, square, after)

    return optax.GradientTransformation(init, update)


def _wide(array: jax.Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


def _axes(array: jax.Array) -> tuple[int, ...]:
    """Returns the axes of the matrix."""
    return tuple(range(max(0, array.ndim - 2), array.ndim))


def _zeros(leaf: jax.Array) -> jax.Array:
    axes = _axes(leaf)
    shape = (1 if i in axes else n for i, n in enumerate(leaf.shape))
    return jnp.zeros(tuple(shape), _wide(leaf))


def _over(reduce: Any, array: jax.Array) -> jax.Array:
    return reduce(array.astype(_wide(array)), _axes(array), keepdims=True)


def _clipped(grad: jax.Array, top: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns the gradient, wide, with its top brought down to the threshold."""
    g = grad.astype(top.dtype)
    down = g * (threshold / jnp.where(top > 0, top, 1))
    return jnp.where(jnp.abs(g) > threshold, down, g)
