"""One table with a row per optimizer, and the trees and gradients they are run on."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lowrank_optax

RANK = 3
FLOAT = 4  # bytes of a float32 or an int32


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer, and what it needs.

    Attributes:
        name: Id of its tests.
        build: (learning rate or schedule, seed) -> optimizer of rank ``RANK``.
        at_full_size: Learning rate -> the optimizer that leaves at full size get.
        moments: Arrays of (a*c, r) that the inner transformation keeps per matrix.
        trend: Floats that the refresh rule keeps per matrix.
        is_long: Whether it projects the long side of each matrix.
        is_random: Whether the basis depends on the seed.
        rank: Rank of the bases.
        granularity: c, where it divides the projected side.
        has_basis: Whether the state holds the basis.
        factored: Whether it keeps a*c + b/c numbers more per matrix.
        learning_rate: For the least-squares problem, annealed to 0 over ``STEPS``.
        loss: Least-squares loss that it must reach, as a share of the first one.
    """

    name: str
    build: Callable[..., optax.GradientTransformationExtraArgs]
    at_full_size: Callable[..., optax.GradientTransformation]
    moments: int
    trend: int
    is_long: bool
    is_random: bool
    learning_rate: float
    loss: float
    rank: int = RANK
    granularity: int = 1
    has_basis: bool = True
    factored: bool = False


def _around(inner: optax.GradientTransformation, **parts) -> dict[str, Callable]:
    """Returns both builders of a row for ``scale_by_low_rank`` around ``inner``."""

    def build(learning_rate, seed=0):
        return optax.chain(
            lowrank_optax.scale_by_low_rank(inner, seed=seed, **parts),
            optax.scale_by_learning_rate(learning_rate),
        )

    def at_full_size(learning_rate):
        return optax.chain(inner, optax.scale_by_learning_rate(learning_rate))

    return {"build": build, "at_full_size": at_full_size}


def _adarankgrad(learning_rate, seed=0):
    refresh = lowrank_optax.on_convergence(2, 4, decay=0.5, check_interval=1)
    return lowrank_optax.adarankgrad(learning_rate, RANK, refresh=refresh, seed=seed)


def _galore(learning_rate, seed=0):
    return lowrank_optax.galore(learning_rate, RANK, update_proj_gap=3, seed=seed)


def _vlorp(learning_rate, seed=0):
    refresh = lowrank_optax.every(3)
    return lowrank_optax.vlorp(learning_rate, 1, 2, refresh=refresh, seed=seed)


def _projfactor(learning_rate, seed=0):
    refresh = lowrank_optax.every(3)
    return lowrank_optax.projfactor(learning_rate, 1, 2, refresh=refresh, seed=seed)


ROWS = (
    Row(
        name="adarankgrad",
        build=_adarankgrad,
        at_full_size=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.0),
        moments=2,
        trend=2,
        is_long=False,
        is_random=True,
        learning_rate=0.1,
        loss=1e-5,
    ),
    Row(
        name="galore",
        build=_galore,
        at_full_size=lambda learning_rate: optax.adamw(
            learning_rate, eps=1e-6, weight_decay=0.0
        ),
        moments=2,
        trend=0,
        is_long=False,
        is_random=False,
        learning_rate=1.0,
        loss=1e-3,
    ),
    Row(
        name="momentum-svd-long-side",
        **_around(
            optax.trace(0.9),
            rank=RANK,
            basis=lowrank_optax.exact_svd(),
            refresh=lowrank_optax.every(4),
            side="long",
        ),
        moments=1,
        trend=0,
        is_long=True,
        is_random=False,
        learning_rate=0.3,
        loss=1e-4,
    ),
    Row(
        name="lion-fine-on-convergence-zero",
        **_around(
            optax.scale_by_lion(),
            rank=1,
            basis=lowrank_optax.range_finder(1),
            refresh=lowrank_optax.on_convergence(2, 4, decay=0.5, check_interval=1),
            rebase="zero",
            granularity=2,
        ),
        moments=1,
        trend=2,
        is_long=False,
        is_random=True,
        learning_rate=0.1,
        loss=1e-4,
        rank=1,
        granularity=2,
    ),
    Row(
        name="vlorp",
        build=_vlorp,
        at_full_size=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.0),
        moments=2,
        trend=0,
        is_long=False,
        is_random=True,
        learning_rate=1.0,
        loss=1e-5,
        rank=1,
        granularity=2,
        has_basis=False,
    ),
    Row(
        name="projfactor",
        build=_projfactor,
        at_full_size=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.0),
        moments=1,
        trend=0,
        is_long=False,
        is_random=True,
        learning_rate=1.0,
        loss=1e-5,
        rank=1,
        granularity=2,
        has_basis=False,
        factored=True,
    ),
)


class Average(NamedTuple):
    avg: optax.Updates


def averaging():
    """A momentum under a name that the library does not know."""

    def init(params):
        return Average(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        avg = jax.tree.map(lambda m, g: 0.9 * m + g, state.avg, updates)
        return avg, Average(avg)

    return optax.GradientTransformation(init, update)


# Every matrix has both sides above RANK.
SHAPES = {
    "tall": {"w": (9, 5)},
    "wide": {"w": (5, 9)},
    "square": {"w": (6, 6)},
    "vector": {"b": (5,)},
    "scalar": {"s": ()},
    "stacked": {"layers": (2, 7, 5), "experts": (2, 3, 4, 6)},
    "none": {"w": (7, 5), "unused": None},
    "list": [(7, 5), {"b": (5,)}],
    "empty": {},
}
# What is compiled often: a stack, with two states of refresh, and a leaf at full size.
SMALL = {"layers": (2, 7, 5), "bias": (5,)}


def zeros(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Returns a tree of zeros, the parameters of every test that needs no others."""
    return _map_shapes(lambda shape: jnp.zeros(shape, dtype), shapes)


def abstract(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Returns a tree of ``jax.ShapeDtypeStruct``."""
    return _map_shapes(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes)


def _map_shapes(function: Callable, shapes: Any) -> Any:
    return jax.tree.map(function, shapes, is_leaf=lambda x: isinstance(x, tuple))


def gradients(params: Any, step: int) -> Any:
    """Returns normal gradients, the same for the same step."""
    # By NumPy, which compiles nothing.
    rng = np.random.default_rng((7, step))
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )


class Compiled(NamedTuple):
    """An optimizer with its update jitted once for all tests.

    Attributes:
        optimizer: Built from the row, at learning rate 0.1.
        update: Its update, jitted.
        traces: One entry for each time that ``update`` was traced.
    """

    optimizer: optax.GradientTransformationExtraArgs
    update: Callable
    traces: list


@functools.cache
def compiled(row: Row) -> Compiled:
    """Returns the row's optimizer; each row and tree compiles once per session."""
    optimizer = row.build(0.1)
    traces = []

    @jax.jit
    def update(updates, state, params):
        traces.append(1)
        return optimizer.update(updates, state, params)

    return Compiled(optimizer, update, traces)


def run(
    update: Callable, state: Any, params: Any, steps: range
) -> tuple[list[Any], Any]:
    """Returns the updates of the steps, and the state after them."""
    history = []
    for step in steps:
        updates, state = update(gradients(params, step), state, params)
        history.append(updates)
    return history, state


def types(tree: Any) -> Any:
    """Returns the tree of ``jax.typeof``: shape, dtype, weak type and sharding."""
    return jax.tree.map(jax.typeof, tree)


def nnx_trained_beside(
    transformation: optax.GradientTransformation, model: nnx.Module, steps: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Trains a module by ``nnx.Optimizer``, and its parameters by the update itself.

    Args:
        transformation: Used by both.
        model: Trained in place.
        steps: Updates, by the gradients of :func:`gradients`.

    Yields:
        After each update the module's parameters, what ``update`` itself came to, and
        its state.
    """
    wrapped = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, update = transformation.init(params), jax.jit(transformation.update)

    @nnx.jit
    def wrapped_update(model, wrapped, grads):
        wrapped.update(model, grads)

    for step in range(steps):
        grads = gradients(params, step)
        boxed = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(boxed, grads)
        wrapped_update(model, wrapped, boxed)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, state


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Returns a tree of normal numbers in the place of shapes, a third in size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def with_bases(state, seed=7):
    """Returns a state with bases of random numbers, as if not made of any gradient.

    To compute bases would take most of the time of a test that only needs some.
    """
    rng = np.random.default_rng(seed)

    def filled(path, leaf):
        if not re.search(r"\.basis(\.codes|\.absmax)?$", jax.tree_util.keystr(path)):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            values = rng.integers(1, 100, leaf.shape)
        else:
            values = rng.normal(size=leaf.shape) / 3
        return jax.device_put(jnp.asarray(values, leaf.dtype), leaf.sharding)

    filled_state = jax.tree_util.tree_map_with_path(filled, state)
    changed = jax.tree.map(lambda a, b: a is not b, state, filled_state)
    assert any(jax.tree.leaves(changed))
    return filled_state
