"""NorMuon's scale by neuron: a second moment of one number for each output."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.states import as_given
from lowrank_optax.checks import check_decay, check_positive, is_known
from lowrank_optax.matrix.arrays import as_arrays, leaf_name, wide
from lowrank_optax.matrix.boxes import boxed_like, contents, is_box, unboxed
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.plan import plan_leaves, views_of
from lowrank_optax.matrix.sharding import on_mesh_of, zeros_beside
from lowrank_optax.matrix.view import MatrixView

_EPS = 1e-8


class ScaleByNeuronState(NamedTuple):
    """State of :func:`scale_by_neuron`.

    Attributes:
        squares: Tree like the parameters. For a leaf with a matrix, the average of the
            mean square of each neuron's updates, float32 or wider; in the leaf's shape,
            with length 1 along the axes of the rows. For other leaves, and for all if
            the decay is 0, ``optax.MaskedNode()``.
    """

    squares: Any


def scale_by_neuron(
    decay: jax.typing.ArrayLike = 0.95,
    *,
    rms: jax.typing.ArrayLike | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformation:
    r"""Brings the updates of all neurons of a matrix to one size.

    U_t (n, m) is the update of a kernel of n inputs and m outputs, whatever method made
    it. A neuron is an output, a column. For each neuron j:

    .. math::
        v_{t,j} = \beta v_{t-1,j} + (1 - \beta) \frac{1}{n} \sum_i U_{t,ij}^2, \quad
        W_{t,ij} = \frac{U_{t,ij}}{\sqrt{v_{t,j}} + \epsilon}, \quad
        U'_t = \frac{\|U_t\|_F}{\|W_t\|_F} W_t

    The update keeps its norm, so that the learning rate keeps its meaning; no bias
    correction is needed. With ``rms`` the factor is
    :math:`\mathrm{rms} \sqrt{n m} / \|W_t\|_F` instead. A zero update stays zero.
    Leaves without a matrix pass unchanged. Matrices of a stack are treated one by one.

    Chain it behind a transformation and before the learning rate::

        optax.chain(
            lowrank_optax.scale_by_low_rank_muon(rank=64),
            lowrank_optax.scale_by_neuron(),
            optax.scale_by_learning_rate(1e-3),
        )

    Squares are in float32: updates between 1e-15 and 1e18 in size have them.

    State: m numbers a matrix, float32; none with ``decay=0``. Cost: some passes over
    the update. What it gains behind :func:`low_rank_muon` is in
    ``docs/methods/low_rank_muon.md``.

    Args:
        decay: Beta, in [0, 1). 0 gives each neuron the same size at each update, and
            there is no state. A traced 0 has one.
        rms: Root mean square of a matrix's updates; above 0. None: that of what comes
            in.
        dimension_numbers: See :func:`scale_by_low_rank`.

    Returns:
        A transformation. Its updates have the shapes and dtypes of those it gets.

    Raises:
        ValueError: If ``decay`` or ``rms`` is out of its range; in ``init``, if
            dimension numbers do not fit a leaf; in ``update``, if the updates do not
            fit the state.

    References:
        Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, behind Muon.
        There the update's root mean square becomes 0.2, whatever it was. epsilon is
        1e-8, as there.

        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025, has
        ``decay=0`` on the gradients themselves. There each column has unit length.

    Example:
        >>> params = {"w": jnp.ones((64, 16)), "b": jnp.ones(16)}
        >>> tx = scale_by_neuron()
        >>> state = tx.init(params)
        >>> state.squares["w"].shape, state.squares["b"]
        ((1, 16), MaskedNode())
    """
    check_decay("decay", decay)
    check_positive("rms", rms)
    is_stateless = is_known(decay) and decay == 0

    def views(tree: Any) -> dict[tuple, MatrixView | None]:
        return views_of(plan_leaves(tree, 0, "short", dimension_numbers))

    def init(params: Any) -> ScaleByNeuronState:
        params = as_arrays(params)
        found = views(params)

        def zeros(path, leaf):
            view = found[path]
            if view is None or is_stateless:
                return optax.MaskedNode()
            places = range(len(view.shape))
            axes = [() if i in view.row_axes else (i,) for i in places]
            dtype = wide(contents(leaf).dtype)
            return zeros_beside(leaf, _shape_of_squares(view), dtype, axes)

        squares = jax.tree_util.tree_map_with_path(zeros, params, is_leaf=is_box)
        return ScaleByNeuronState(on_mesh_of(params, squares))

    def update(updates, state, params=None):
        del params
        updates = as_arrays(updates)
        found, arrays = views(updates), unboxed(updates)
        paths, treedef = jax.tree_util.tree_flatten_with_path(arrays)
        before = treedef.flatten_up_to(unboxed(state.squares))
        scaled, squares = [], []
        for (path, array), old in zip(paths, before, strict=True):
            view = found[path]
            if view is not None:
                if is_stateless:
                    average = _mean_squares(array, view, wide(array.dtype))
                else:
                    _check(path, view, old)
                    mean = _mean_squares(array, view, old.dtype)
                    average = old = decay * old + (1 - decay) * mean
                array = _scaled(array, average, view, rms)
            scaled.append(array)
            squares.append(old)
        new = ScaleByNeuronState(treedef.unflatten(squares))
        return boxed_like(treedef.unflatten(scaled), updates), as_given(new, state)

    return optax.GradientTransformation(init, update)


def _shape_of_squares(view: MatrixView) -> tuple[int, ...]:
    """Returns the leaf's shape with length 1 along the axes of the rows."""
    return tuple(1 if i in view.row_axes else n for i, n in enumerate(view.shape))


def _check(path: tuple, view: MatrixView, squares: Any) -> None:
    """Raises ValueError if a state does not fit an update."""
    expected = _shape_of_squares(view)
    found = getattr(squares, "shape", None)
    if found != expected:
        raise ValueError(
            f"{leaf_name(path)}: scale_by_neuron's state has "
            f"{'nothing' if found is None else f'shape {found}'}, and the update wants "
            f"{expected}; make the state from the same parameters."
        )


def _mean_squares(update: jax.Array, view: MatrixView, dtype: Any) -> jax.Array:
    """Returns the mean square of each neuron's updates."""
    return jnp.mean(jnp.square(update.astype(dtype)), view.row_axes, keepdims=True)


def _scaled(
    update: jax.Array, squares: jax.Array, view: MatrixView, rms: Any
) -> jax.Array:
    """Returns the update of a leaf, each neuron divided by the root of its square."""
    u = update.astype(squares.dtype)
    scaled = u / (jnp.sqrt(squares) + _EPS)
    sides = view.row_axes + view.column_axes
    size, other = (
        jnp.sqrt(jnp.mean(jnp.square(x), sides, keepdims=True)) for x in (u, scaled)
    )
    if rms is not None:
        size = jnp.asarray(rms, u.dtype)
    return (scaled * (size / jnp.where(other > 0, other, 1))).astype(update.dtype)
