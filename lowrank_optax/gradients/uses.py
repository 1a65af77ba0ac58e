"""What becomes of a projected parameter in each operation of a traced program.

Casts, transposes, reshapes and slices of its stack keep track of its axes; products and
lookups, where it is used, become ones whose reverse rules give the projected gradient.
Anything else is an error that names it: never a silently wrong or missing gradient.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lowrank_optax.gradients.axes import in_order, reshaped
from lowrank_optax.gradients.followed import Followed, unsupported
from lowrank_optax.gradients.product import Product, product


def bound(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the results of an operation as it stands."""
    with equation.ctx.manager:
        output = _bind(equation.primitive, inputs, equation.params)
    return list(output) if equation.primitive.multiple_results else [output]


def _bind(primitive: core.Primitive, inputs: Sequence[Any], params: Any) -> Any:
    return primitive.bind(*inputs, **primitive.get_bind_params(params))


def _one(equation, inputs) -> tuple[Followed, list[Any]]:
    """Returns the followed operand of an operation whose others are plain."""
    first, *others = inputs
    if not isinstance(first, Followed) or any(isinstance(x, Followed) for x in others):
        raise unsupported(equation, inputs)
    return first, others


def _cast(equation, inputs) -> list[Any]:
    """An operation that leaves places as they are: a cast, a copy, a sharding."""
    followed, _ = _one(equation, inputs)
    (value,) = bound(equation, [followed.value])
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise unsupported(equation, inputs, f"cast to {value.dtype}")
    return [dataclasses.replace(followed, value=value)]


def _varying(equation, inputs) -> list[Any]:
    """What makes copies of a device differ, in type, from those of others."""
    followed, _ = _one(equation, inputs)
    # All three: what is gained for the coordinates is then summed over the devices.
    return [followed.of([bound(equation, [x])[0] for x in followed.arrays()])]


def _transpose(equation, inputs) -> list[Any]:
    followed, _ = _one(equation, inputs)
    (value,) = bound(equation, [followed.value])
    order = equation.params["permutation"]
    dims = tuple(followed.dims[i] for i in order)
    return [dataclasses.replace(followed, value=value, dims=dims)]


def _reshape(equation, inputs) -> list[Any]:
    """Reshapes, squeezes, and broadcasts that add axes of length 1 only."""
    followed, _ = _one(equation, inputs)
    (value,) = bound(equation, [followed.value])
    # A broadcast keeps the order of axes; one that repeats changes the size.
    is_same = value.size == followed.value.size
    dims = reshaped(followed.dims, tuple(value.shape)) if is_same else None
    if dims is None:
        raise unsupported(equation, inputs, "across its axes")
    return [dataclasses.replace(followed, value=value, dims=dims)]


def _slice(equation, inputs) -> list[Any]:
    """A piece of the stack: one layer of a scanned kernel, one expert."""
    followed, others = _one(equation, inputs)
    (value,) = bound(equation, [followed.value, *others])
    starts = equation.params.get("start_indices", others)
    cut = [i for i, n in enumerate(value.shape) if n != followed.value.shape[i]]
    places = [stack_place(followed, i) for i in cut]
    stack = [place for place in places if place is not None]
    if len(stack) < len(cut) or equation.params.get("strides"):
        raise unsupported(equation, inputs, "cutting its matrix")
    coordinates, basis, dims = followed.coordinates, followed.basis, list(followed.dims)
    for i, place in zip(cut, stack, strict=True):
        if value.shape[i] != 1:
            raise unsupported(equation, inputs, "cutting its stack in pieces")
        coordinates, basis = (
            jax.lax.dynamic_slice_in_dim(x, starts[i], 1, place)
            for x in (coordinates, basis)
        )
        dims[i] = ()
    left = tuple(x for place, x in enumerate(followed.stack) if place not in stack)
    # What has been cut to one is not counted any more.
    squeezed = [jnp.squeeze(x, tuple(stack)) for x in (coordinates, basis)]
    return [
        dataclasses.replace(
            followed,
            value=value,
            coordinates=squeezed[0],
            basis=squeezed[1],
            dims=tuple(dims),
            stack=left,
        )
    ]


def stack_place(followed: Followed, dim: int) -> int | None:
    """Returns where a dimension stands in the stack; None, if it is not one of it."""
    atoms = followed.dims[dim]
    if not atoms:
        sizes = [followed.view.shape[axis] for axis in followed.stack]
        return sizes.index(1) if 1 in sizes else None
    if len(atoms) != 1 or atoms[0].axis not in followed.stack:
        return None
    whole = atoms[0].size == followed.view.shape[atoms[0].axis]
    return followed.stack.index(atoms[0].axis) if whole else None


def _dot(equation, inputs) -> list[Any]:
    left, right = inputs
    (left_sum, right_sum), (left_batch, right_batch) = equation.params[
        "dimension_numbers"
    ]
    if isinstance(left, Followed) and isinstance(right, Followed):
        raise unsupported(equation, inputs, "with another projected parameter")
    ours = (left, left_sum, left_batch), (right, right_sum, right_batch)
    if isinstance(right, Followed):
        return [_product(equation, *ours)]
    y = _product(equation, *ours[::-1])
    # The parameter stands second in the rule, and its dimensions behind those of x.
    count = len(left_batch)
    free = left.value.ndim - count - len(left_sum)
    batch, others = range(count), range(count, y.ndim - free)
    return [y.transpose(*batch, *range(y.ndim - free, y.ndim), *others)]


def _product(equation, of_x, of_kernel) -> jax.Array:
    """Returns the product, with its reverse rule."""
    (x, x_sum, x_batch), (kernel, k_sum, k_batch) = of_x, of_kernel
    kernel = _without_single_stacks(kernel, k_batch)
    view = kernel.view
    k_free = tuple(i for i in range(kernel.value.ndim) if i not in (*k_sum, *k_batch))
    contracts_projected = True
    orders = _orders(kernel, k_sum, k_free, view.projected_axes, view.kept_axes)
    if None in orders:
        contracts_projected = False
        orders = _orders(kernel, k_sum, k_free, view.kept_axes, view.projected_axes)
    k_order, f_order = orders
    if k_order is None or f_order is None:
        raise unsupported(equation, [kernel], "over other axes than its matrix has")
    stack = [stack_place(kernel, i) for i in k_batch]
    if sorted(stack, key=str) != list(range(len(kernel.stack))):
        raise unsupported(equation, [kernel], "with its stack summed or free")
    pairs = dict(zip(k_sum, x_sum, strict=True))
    batches = dict(zip(k_batch, x_batch, strict=True))
    by_stack = [k_batch[stack.index(place)] for place in range(len(stack))]
    numbers = ((x_sum, k_sum), (x_batch, k_batch))
    params = {**equation.params, "dimension_numbers": numbers}
    spec = Product(
        contracting=tuple(pairs[i] for i in k_order),
        batch=tuple(batches[i] for i in by_stack),
        y_batch=tuple(list(k_batch).index(i) for i in by_stack),
        # Results: batch dimensions, then those of x, then those of the parameter.
        y_free=tuple(x.ndim - len(x_sum) + k_free.index(i) for i in f_order),
        contracts_projected=contracts_projected,
        view=view,
        numbers=tuple(
            (name, _static(value))
            for name, value in params.items()
            if value is not None
        ),
    )
    return product(spec, x, *kernel.arrays())


def _orders(kernel: Followed, k_sum, k_free, summed, free):
    """Returns summed and free dimensions in the order of these axes, or None each."""
    shape = kernel.view.shape
    return (
        in_order(kernel.dims, tuple(k_sum), summed, shape),
        in_order(kernel.dims, k_free, free, shape),
    )


def _without_single_stacks(kernel: Followed, batch) -> Followed:
    """Returns a kernel whose stacks of one matrix are batch dimensions, or gone."""
    kept = {stack_place(kernel, i) for i in batch}
    gone = tuple(
        place
        for place, axis in enumerate(kernel.stack)
        if place not in kept and kernel.view.shape[axis] == 1
    )
    return dataclasses.replace(
        kernel,
        coordinates=jnp.squeeze(kernel.coordinates, gone),
        basis=jnp.squeeze(kernel.basis, gone),
        stack=tuple(x for place, x in enumerate(kernel.stack) if place not in gone),
    )


def _static(value: Any) -> Any:
    """Returns dimension numbers as nested tuples, so that they can be compared."""
    if isinstance(value, (tuple, list)):
        return tuple(_static(item) for item in value)
    return value


def _gather(equation, inputs) -> list[Any]:
    """An embedding: rows picked, whole, where the columns are what is projected."""
    table, others = _one(equation, inputs)
    numbers, sizes = (equation.params[k] for k in ("dimension_numbers", "slice_sizes"))
    view = table.view
    is_rows = (
        table.value.ndim == 2
        and not table.stack
        and in_order(table.dims, (1,), view.projected_axes, view.shape) is not None
        and in_order(table.dims, (0,), view.kept_axes, view.shape) is not None
        and sizes == (1, table.value.shape[1])
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and view.granularity == 1
    )
    if not is_rows:
        raise unsupported(equation, inputs, "picking other than whole rows")

    def pick(array, indices):
        params = {**equation.params, "slice_sizes": (1, array.shape[1])}
        return _bind(equation.primitive, (array, indices), params)

    @jax.custom_vjp
    def picked(value, coordinates, basis, indices):
        del coordinates, basis
        return pick(value, indices)

    def forward(value, coordinates, basis, indices):
        return picked(value, coordinates, basis, indices), (basis, indices)

    offset = numbers.offset_dims[0]
    like = jax.eval_shape(lambda x: x, table.coordinates)

    def backward(residuals, dy):
        basis, indices = residuals
        # (..., d) at the offset's place -> (..., r) there.
        narrow = jnp.moveaxis(
            jnp.moveaxis(dy, offset, -1).astype(like.dtype) @ basis, -1, offset
        )
        (found,) = jax.linear_transpose(lambda c: pick(c, indices), like)(narrow)
        return None, found, None, None

    picked.defvjp(forward, backward)
    return [picked(*table.arrays(), *others)]


USES: dict[str, Callable[[core.JaxprEqn, list[Any]], list[Any]]] = {
    "convert_element_type": _cast,
    "copy": _cast,
    "sharding_constraint": _cast,
    "name": _cast,
    "reduce_precision": _cast,
    "pvary": _varying,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _reshape,
    "slice": _slice,
    "dynamic_slice": _slice,
    "dot_general": _dot,
    "gather": _gather,
}
