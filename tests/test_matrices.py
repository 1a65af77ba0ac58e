"""A leaf as matrices and back; projecting and lifting; which axes form the matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax
from lowrank_optax import LowRankDimensionNumbers, dimension_numbers_by_shape
from lowrank_optax.matrix.view import MatrixView, matrix_view

# Derandomized: the same examples on every machine, nothing stored between runs.
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def views(draw) -> MatrixView:
    """Any view: rows, columns and stack take the axes in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    axes = draw(st.permutations(range(len(shape))))
    rows = draw(st.integers(1, len(shape) - 1))
    columns = draw(st.integers(1, len(shape) - rows))
    numbers = LowRankDimensionNumbers(axes[:rows], axes[rows : rows + columns])
    side = draw(st.sampled_from(["short", "long"]))
    return matrix_view(shape, numbers, side, "w", draw(st.integers(1, 5)))


def _leaf(view: MatrixView) -> np.ndarray:
    return np.arange(math.prod(view.shape), dtype=np.float32).reshape(view.shape)


@examples
@given(views())
def test_matrices_and_leaf_are_inverse(view):
    matrices = view.matrices(_leaf(view))
    assert matrices.shape == (*view.stack, view.rows, view.columns)
    np.testing.assert_array_equal(view.leaf(matrices), _leaf(view))


@examples
@given(views(), st.data())
def test_each_entry_is_where_its_axes_say(view, data):
    index = tuple(data.draw(st.integers(0, length - 1)) for length in view.shape)

    def position(axes):
        place = 0
        for axis in axes:
            place = place * view.shape[axis] + index[axis]
        return place

    stack = tuple(index[axis] for axis in view.stack_axes)
    entry = (*stack, position(view.row_axes), position(view.column_axes))
    assert view.matrices(_leaf(view))[entry] == _leaf(view)[index]


@examples
@given(views(), st.integers(1, 7))
def test_the_granularity_is_the_nearest_divisor_at_or_below(view, asked):
    numbers = LowRankDimensionNumbers(view.row_axes, view.column_axes)
    found = matrix_view(view.shape, numbers, "short", "w", asked)
    b = min(view.rows, view.columns)
    assert found.granularity == max(c for c in range(1, asked + 1) if b % c == 0)
    assert found.projected_size * found.kept_size == view.rows * view.columns


@settings(examples, max_examples=12)
@given(views())
def test_projecting_is_a_product_with_the_oriented_matrix(view):
    rng = np.random.default_rng(0)
    leaf = rng.integers(-4, 5, size=view.shape)
    basis = rng.integers(-4, 5, size=(*view.stack, view.projected_size, 2))
    matrices = np.asarray(view.matrices(leaf))
    if view.projects_rows:
        matrices = np.swapaxes(matrices, -1, -2)
    # The definition: each row of the oriented matrix cut in c pieces, in their order.
    oriented = matrices.reshape(*view.stack, view.kept_size, view.projected_size)
    g, p = jnp.asarray(leaf, jnp.float32), jnp.asarray(basis, jnp.float32)
    np.testing.assert_array_equal(view.oriented(g), oriented)
    np.testing.assert_array_equal(view.project(g, p), oriented @ basis)


@settings(examples, max_examples=8)
@given(views())
def test_lifting_is_the_adjoint_of_projecting(view):
    # Small integers, so that float32 products and sums are exact.
    rng = np.random.default_rng(0)
    leaf = rng.integers(-4, 5, size=view.shape)
    basis = rng.integers(-4, 5, size=(*view.stack, view.projected_size, 2))
    coordinates = rng.integers(-4, 5, size=(*view.stack, view.kept_size, 2))
    g, p, n = (jnp.asarray(x, jnp.float32) for x in (leaf, basis, coordinates))
    projected = np.sum(np.asarray(view.project(g, p)) * coordinates)
    assert projected == np.sum(np.asarray(view.lift(n, p)) * leaf)


@pytest.mark.parametrize(
    ("shape", "side", "projected", "kept"),
    [
        ((7, 4), "short", 4, 7),
        ((4, 7), "short", 4, 7),
        ((7, 4), "long", 7, 4),
        ((4, 7), "long", 7, 4),
        ((3, 7, 4), "short", 4, 7),
    ],
)
def test_side_says_which_length_is_projected(shape, side, projected, kept):
    numbers = dimension_numbers_by_shape(jnp.ones(shape))
    view = matrix_view(shape, numbers, side, "w")
    assert (view.projected_size, view.kept_size) == (projected, kept)
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    basis = np.ones((*view.stack, projected, 2), np.float32)
    assert view.oriented(leaf).shape == (*view.stack, kept, projected)
    expected = view.oriented(leaf) @ basis
    np.testing.assert_allclose(view.project(leaf, basis), expected, rtol=1e-4)


def test_a_square_matrix_projects_its_columns_for_short_and_its_rows_for_long():
    numbers = LowRankDimensionNumbers()
    assert not matrix_view((5, 5), numbers, "short", "w").projects_rows
    assert matrix_view((5, 5), numbers, "long", "w").projects_rows


def test_axes_may_count_from_the_end():
    from_end = matrix_view((2, 3, 4), LowRankDimensionNumbers(-2, -1), "short", "w")
    assert from_end == matrix_view(
        (2, 3, 4), LowRankDimensionNumbers(1, 2), "short", "w"
    )


def test_default_numbers_stack_all_but_the_last_two_axes():
    shapes = {"a": (5,), "b": (3, 4), "c": (2, 6, 3, 4), "d": ()}
    found = dimension_numbers_by_shape(
        {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        }
    )
    assert found == {
        "a": None,
        "b": LowRankDimensionNumbers(0, 1),
        "c": LowRankDimensionNumbers(2, 3),
        "d": None,
    }


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (LowRankDimensionNumbers(0, 3), r"\['w'\]: axis 3 does not exist in shape"),
        (LowRankDimensionNumbers(-4, 1), r"\['w'\]: axis -4 does not exist in shape"),
        (LowRankDimensionNumbers(0, (1, 0)), r"\['w'\]: .* must be disjoint and not"),
        (LowRankDimensionNumbers(0, -3), r"\['w'\]: .* must be disjoint and not"),
        (LowRankDimensionNumbers((), 1), r"\['w'\]: .* must be disjoint and not empty"),
        (LowRankDimensionNumbers(0, ()), r"\['w'\]: .* must be disjoint and not empty"),
    ],
)
def test_numbers_that_do_not_fit_raise_in_init(numbers, message):
    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(), rank=1, dimension_numbers={"w": numbers}
    )
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.ones((2, 3, 4))})


def _steps(tx, params, grads):
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for gradient in grads:
        update_now, state = update(gradient, state)
        updates.append(update_now)
    return updates, state


def _gaussian(*shape):
    draws = np.random.default_rng(1).normal(size=shape)
    return jnp.asarray(draws, jnp.float32)


@pytest.mark.parametrize("side", ["short", "long"])
def test_a_transposed_gradient_gives_the_transposed_update(side):
    tx = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        rank=3,
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(2, stagger=False),
        side=side,
    )
    grads = [{"g": g, "transposed": g.T} for g in _gaussian(5, 9, 6)]
    for update in _steps(tx, grads[0], grads)[0]:
        # The two products run over other strides: rounding of R, divided by its root.
        np.testing.assert_allclose(update["transposed"].T, update["g"], atol=1e-4)


def test_an_attention_kernel_gets_the_update_of_its_reshaped_matrix():
    def steps(grads, numbers):
        tx = lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(),
            rank=3,
            basis=lowrank_optax.exact_svd(),
            refresh=lowrank_optax.every(2),
            dimension_numbers={"w": numbers},
        )
        return _steps(tx, {"w": grads[0]}, [{"w": g} for g in grads])

    grads = _gaussian(5, 10, 3, 4)
    kernel, state = steps(grads, LowRankDimensionNumbers(0, (1, 2)))
    matrix, _ = steps(grads.reshape(5, 10, 12), LowRankDimensionNumbers(0, 1))
    assert state.subspaces["w"].basis.shape == (10, 3)
    for in_heads, flat in zip(kernel, matrix, strict=True):
        # A reshape moves no number: both compute the same.
        np.testing.assert_allclose(
            in_heads["w"].reshape(10, 12), flat["w"], rtol=1e-6, atol=1e-6
        )


def test_axes_in_any_order_get_the_update_of_the_plain_stack():
    grads = _gaussian(3, 2, 9, 6)  # steps, layers, rows, columns

    def updates(grads, numbers):
        tx = lowrank_optax.scale_by_low_rank(
            optax.trace(0.9),
            rank=3,
            basis=lowrank_optax.exact_svd(),
            dimension_numbers={"w": numbers},
        )
        return _steps(tx, {"w": grads[0]}, [{"w": g} for g in grads])[0]

    plain = updates(grads, LowRankDimensionNumbers(1, 2))
    moved = updates(grads.transpose(0, 3, 2, 1), LowRankDimensionNumbers(1, 0))
    for expected, actual in zip(plain, moved, strict=True):
        # Only the order of the additions in the products may differ.
        np.testing.assert_allclose(
            actual["w"].transpose(2, 1, 0), expected["w"], atol=1e-5
        )
