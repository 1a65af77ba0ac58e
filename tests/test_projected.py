"""``Projected`` among gradients: what takes it as it is, what refuses it by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import Projected
from lowrank_optax.projected import gradients_by_path
from tests.suite import gradients, types, zeros

pytestmark = pytest.mark.usefixtures("fast_compilation")

RANK = 2
SHAPES = {"w": (2, 9, 6), "other": (7, 12), "b": (6,)}
PARAMS = zeros(SHAPES)
# (*stack, a*c, r) of those that are projected.
INSIDE = {"w": (2, 9, RANK), "other": (12, RANK)}


def _low_rank(**parts):
    return lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), RANK, **parts)


def narrow(step=0):
    """Gradients of which two are projected."""
    found = gradients(zeros({**SHAPES, **INSIDE}), step)
    return {k: Projected(x) if k in INSIDE else x for k, x in found.items()}


def started(optimizer):
    """Returns the state after an update by full gradients: there are bases."""
    update = jax.jit(optimizer.update)
    return update(gradients(PARAMS, 100), optimizer.init(PARAMS), PARAMS)[1]


@functools.cache
def expected():
    """The updates of the bare transformation."""
    optimizer = _low_rank()
    update = jax.jit(optimizer.update)
    return jax.device_get(update(narrow(), started(optimizer), PARAMS)[0])


def assert_close(actual, expected):
    # Other programs: float32 rounding, enlarged by Adam's division.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        actual,
        expected,
    )


# --- the node itself ---------------------------------------------------------------


def test_it_is_a_node_of_one_array_at_the_path_of_its_leaf():
    leaves = jax.tree.leaves_with_path(narrow())
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [
        "['b']",
        "['other']",
        "['w']",
    ]
    doubled = jax.tree.map(lambda x: 2 * x, narrow())
    assert isinstance(doubled["w"], Projected)
    np.testing.assert_array_equal(
        doubled["w"].coordinates, 2 * narrow()["w"].coordinates
    )
    assert [type(x) for x in gradients_by_path(narrow()).values()] == [
        type(narrow()["b"]),
        Projected,
        Projected,
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.ndim > 1,
        lambda x: np.bool_(x.ndim > 1),
        lambda x: "label",
        lambda x: optax.MaskedNode(),
    ],
)
def test_what_makes_labels_or_masks_of_arrays_makes_them_of_it(function):
    like = jax.tree.map(function, {k: jnp.zeros(x) for k, x in SHAPES.items()})
    assert jax.tree.map(function, narrow()) == like
    assert jax.tree.structure(jax.tree.map(function, narrow())) == jax.tree.structure(
        like
    )


def test_it_goes_through_compiled_functions_as_it_is():
    def twice(tree):
        return jax.lax.fori_loop(0, 2, lambda i, x: jax.tree.map(jnp.add, x, x), tree)

    found = jax.jit(twice)(narrow())
    assert types(found) == types(narrow())
    shapes = jax.eval_shape(twice, narrow())
    assert jax.tree.structure(shapes) == jax.tree.structure(narrow())


# --- what takes it -----------------------------------------------------------------


def test_the_norm_is_that_of_the_coordinates():
    arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(narrow())]
    whole = np.sqrt(sum(np.sum(x**2) for x in arrays))
    # A float32 sum of 84 squares.
    np.testing.assert_allclose(optax.tree.norm(narrow()), whole, rtol=1e-6)


def test_clipping_by_the_global_norm_scales_the_coordinates():
    clip = optax.clip_by_global_norm(0.5)
    clipped, _ = clip.update(narrow(), clip.init(PARAMS))
    assert isinstance(clipped["w"], Projected)
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.5, rtol=1e-6)
    factor = 0.5 / optax.tree.norm(narrow())
    np.testing.assert_allclose(
        clipped["other"].coordinates, factor * narrow()["other"].coordinates, rtol=1e-5
    )


def _by_ndim(tree):
    return jax.tree.map(lambda x: "low rank" if x.ndim > 1 else "rest", tree)


def _by_path(tree):
    def label(path, _):
        return "rest" if jax.tree_util.keystr(path) == "['b']" else "low rank"

    return jax.tree_util.tree_map_with_path(label, tree)


WRAPPERS = {
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1e6), tx, optax.add_decayed_weights(0.0)
    ),
    "partition by ndim": lambda tx: optax.partition(
        {"low rank": tx, "rest": optax.scale_by_adam()}, _by_ndim
    ),
    "partition by path": lambda tx: optax.partition(
        {"low rank": tx, "rest": optax.scale_by_adam()}, _by_path
    ),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        optax.masked(
            optax.scale_by_adam(),
            lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree),
        ),
    ),
    "apply_if_finite": lowrank_optax.apply_if_finite,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda factor: optax.chain(tx, optax.scale(factor))
    )(factor=1.0),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_wrappers_updates_are_the_bare_ones(wrapper):
    optimizer = WRAPPERS[wrapper](_low_rank())
    state = started(optimizer)
    updates, after = jax.jit(optimizer.update)(narrow(), state, PARAMS)
    assert_close(updates, expected())
    assert types(after) == types(state)


def test_a_projected_gradient_is_the_full_one_of_the_same_coordinates():
    optimizer = _low_rank()
    state = started(optimizer)
    full = gradients(PARAMS, 0)
    plans = lowrank_optax.projections(optimizer, PARAMS)
    inside = {
        name: Projected(
            plans[f"['{name}']"].view.project(full[name], state.subspaces[name].basis)
        )
        for name in INSIDE
    }
    update = jax.jit(functools.partial(optimizer.update, refresh=False))
    whole = update(full, state, PARAMS)
    for some in (["w"], ["other"], ["w", "other"]):
        mixed = {**full, **{name: inside[name] for name in some}}
        assert_close(update(mixed, state, PARAMS), whole)


# --- apply_if_finite -----------------------------------------------------------------


def _spoiled(tree, name):
    def spoil(x):
        return x.at[(0,) * x.ndim].set(jnp.nan)

    return {**tree, name: jax.tree.map(spoil, tree[name])}


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("make", [narrow, functools.partial(gradients, PARAMS)])
def test_an_update_that_is_not_finite_is_left_out(name, make):
    optimizer = lowrank_optax.apply_if_finite(_low_rank())
    state, update = started(optimizer), jax.jit(optimizer.update)
    updates, after = update(_spoiled(make(0), name), state, PARAMS)
    assert types(updates) == types(PARAMS)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert (int(after.notfinite_count), int(after.total_notfinite)) == (1, 1)
    assert not after.last_finite
    _, again = update(make(1), after, PARAMS)
    assert (int(again.notfinite_count), int(again.total_notfinite)) == (0, 1)
    assert again.last_finite


def test_after_so_many_in_a_row_one_is_applied_as_optax_does():
    ours = lowrank_optax.apply_if_finite(optax.sgd(0.1), 2)
    theirs = optax.apply_if_finite(optax.sgd(0.1), 2)
    params = {"b": PARAMS["b"]}
    states = [tx.init(params) for tx in (ours, theirs)]
    grads = {"b": gradients(params, 0)["b"]}
    bad = _spoiled(grads, "b")
    for gradient in (grads, bad, bad, bad, bad, grads, bad):
        found = [
            tx.update(gradient, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in found]
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_without_a_number_none_is_ever_applied():
    optimizer = lowrank_optax.apply_if_finite(optax.sgd(0.1))
    state, bad = optimizer.init(PARAMS), _spoiled(gradients(PARAMS, 0), "b")
    for _ in range(7):
        updates, state = optimizer.update(bad, state, PARAMS)
        assert optax.tree.norm(updates) == 0
    with pytest.raises(ValueError, match="max_consecutive_errors must be >= 0, got -1"):
        lowrank_optax.apply_if_finite(optax.sgd(0.1), -1)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_apply_if_finite_inside_and_around_an_accumulation(order):
    def build(tx):
        if order == "inside":
            return lowrank_optax.accumulate(lowrank_optax.apply_if_finite(tx), 2)
        return lowrank_optax.apply_if_finite(lowrank_optax.accumulate(tx, 2))

    optimizer = build(_low_rank())
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    for _ in range(2):
        _, state = update(gradients(PARAMS, 100), state, PARAMS)
    before = lowrank_optax.subspaces(state)
    # Inside, a spoiled micro-batch spoils its window; around, it is not added.
    windows = [narrow(0), _spoiled(narrow(1), "w"), narrow(2), narrow(2)]
    history = []
    for grads in windows:
        updates, state = update(grads, state, PARAMS)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
        history.append(float(optax.tree.norm(updates)) > 0)
    expected = {"inside": [0, 0, 0, 1], "outside": [0, 0, 1, 0]}[order]
    assert history == list(map(bool, expected))
    for path, subspace in lowrank_optax.subspaces(state).items():
        np.testing.assert_array_equal(subspace.basis, before[path].basis)
        np.testing.assert_array_equal(subspace.age, before[path].age + 1)


# --- what refuses it -----------------------------------------------------------------

REFUSED = {
    "MultiSteps": lambda: optax.MultiSteps(_one(), 2).gradient_transformation(),
    "weight decay in front": lambda: optax.chain(
        optax.add_decayed_weights(0.1), _one()
    ),
    # At rank 1 the momentum (9, 6) and the coordinates (9, 1) would broadcast.
    "momentum in front": lambda: optax.chain(optax.trace(0.9), _one()),
    "Adam in front": lambda: optax.chain(optax.scale_by_adam(), _one()),
    "optax's apply_if_finite": lambda: optax.apply_if_finite(_one(), 3),
    "AdamW": lambda: optax.adamw(0.1),
}


def _one():
    return lowrank_optax.scale_by_low_rank(optax.identity(), 1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_full_gradients_in_front_refuses_it_by_name(name):
    optimizer, params = REFUSED[name](), {"w": jnp.zeros((9, 6))}
    state = optimizer.init(params)
    inside = {"w": Projected(jnp.ones((9, 1)))}
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises((ValueError, TypeError), match="Projected"):
            update(inside, state, params)


@pytest.mark.parametrize(
    ("name", "gradient", "message"),
    [
        ("w", Projected(jnp.ones((2, 9, 3))), r"\['w'\].*\(2, 9, 3\).*\(2, 9, 2\)"),
        ("w", Projected(jnp.ones((9, 2))), r"\['w'\].*\(9, 2\).*\(2, 9, 2\)"),
        ("w", Projected(jnp.ones((2, 9, 6))), r"\['w'\].*\(2, 9, 6\).*\(2, 9, 2\)"),
        ("w", jnp.ones((2, 9, 2)), r"\['w'\].*\(2, 9, 2\) does not fit a basis"),
        ("other", Projected(jnp.ones((7, 2))), r"\['other'\].*\(7, 2\).*\(12, 2\)"),
        ("b", Projected(jnp.ones(6)), r"\['b'\].*\(6,\) does not fit"),
    ],
)
def test_a_gradient_of_another_shape_is_refused_by_its_leaf(name, gradient, message):
    optimizer = _low_rank()
    grads = {**gradients(PARAMS, 0), name: gradient}
    with pytest.raises(ValueError, match=message):
        optimizer.update(grads, optimizer.init(PARAMS), PARAMS)


def test_without_parameters_it_is_refused_and_told_what_to_do():
    optimizer = _low_rank()
    with pytest.raises(ValueError, match=r"\['other'\]: .* needs params too"):
        optimizer.update(narrow(), optimizer.init(PARAMS))


@pytest.mark.parametrize("name", ["w", "other"])
def test_an_accumulation_refuses_another_shape_by_its_leaf(name):
    accumulation = lowrank_optax.accumulate(_low_rank(), 2)
    grads = {**narrow(), name: Projected(jnp.ones((5, RANK)))}
    with pytest.raises(ValueError, match=rf"\['{name}'\]: a gradient of shape .*5, 2"):
        accumulation.add(grads, accumulation.init(PARAMS), 1.0, PARAMS)


# --- a subspace of the leaf's own shape ---------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "columns"),
    [
        ((8, 8), {}, 8),
        # Two rows of four for each column: (2 * 4, 8 / 2) is (8, 4) again.
        ((8, 4), {"side": "long", "granularity": 2}, 4),
    ],
)
def test_a_leaf_whose_coordinates_have_its_own_shape_is_projected_once(
    shape, options, columns
):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")}
    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(), 2, basis=lowrank_optax.exact_svd(), **options
    )
    state = lowrank_optax.resize(tx.init(params), columns)
    full = gradients(params, 1)
    _, state = jax.jit(tx.update)(full, state, params)

    def loss(params):
        return jnp.sum(full["w"] * (jnp.eye(shape[0]) @ params["w"]))

    gradient = lowrank_optax.subspace_value_and_grad(loss, tx)
    _, inside, state = jax.jit(gradient)(params, state)
    assert inside["w"].coordinates.shape == shape
    # Other numbers, so that it shows which of the two is taken for which.
    assert np.max(np.abs(inside["w"].coordinates - full["w"])) > 0.1
    # A square basis loses nothing: both lift to the gradient, to rounding.
    for grads in (inside, full):
        updates, _ = jax.jit(tx.update)(grads, state, params)
        np.testing.assert_allclose(updates["w"], full["w"], atol=1e-5)
    # Nor does an accumulation mistake one for the other.
    accumulation = lowrank_optax.accumulate(tx, 1)
    start = lowrank_optax.resize(accumulation.init(params), columns)
    start = start._replace(inner_state=state)
    for grads in (inside, full):
        updates, _ = jax.jit(accumulation.update)(grads, start, params)
        np.testing.assert_allclose(updates["w"], full["w"], atol=1e-5)
