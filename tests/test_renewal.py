"""Renewal: apart from the update, and ever more seldom where it finds nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.due import LONGEST_WAIT
from tests.suite import ROWS, SMALL, compiled, gradients, types, zeros

pytestmark = pytest.mark.usefixtures("fast_compilation")

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def counts(state):
    """Returns refreshes and failures of every matrix."""
    found = lowrank_optax.subspaces(state).values()
    return np.concatenate([np.ravel([x.refreshes, x.failures]) for x in found])


# --- an update without it ----------------------------------------------------------


@every_row
def test_an_update_without_renewal_is_the_update_on_which_nothing_is_due(row):
    optimizer, update, _ = compiled(row)
    params = zeros(SMALL)
    without = jax.jit(functools.partial(optimizer.update, refresh=False))
    state, compared = optimizer.init(params), 0
    for step in range(8):
        grads = gradients(params, step)
        expected = update(grads, state, params)
        if np.array_equal(counts(expected[1]), counts(state)):
            actual = without(grads, state, params)
            assert types(actual) == types(expected)
            jax.tree.map(np.testing.assert_array_equal, actual, expected)
            compared += 1
        state = expected[1]
    assert compared >= 3


@every_row
def test_a_leaf_without_a_basis_does_not_move_in_it(row):
    optimizer, params = row.build(0.1), zeros(SMALL)
    state = optimizer.init(params)
    without = functools.partial(optimizer.update, refresh=False)
    _, after = jax.jit(without)(gradients(params, 0), state, params)
    np.testing.assert_array_equal(counts(after), 0)
    if row.has_basis:
        updates, _ = jax.jit(without)(gradients(params, 0), state, params)
        assert not np.any(updates["layers"])
        assert np.all(updates["bias"] != 0)


def _galore():
    return lowrank_optax.galore(0.1, 3, update_proj_gap=3)


WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), _galore()),
    "masked": lambda: optax.masked(_galore(), {"layers": True, "bias": False}),
    "partition": lambda: optax.partition(
        {"a": _galore(), "b": optax.adam(0.1)}, {"layers": "a", "bias": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: lowrank_optax.galore(learning_rate, 3)
    )(0.1),
    "low_bit": lambda: lowrank_optax.low_bit(_galore(), 8, 4, min_size=1),
    "accumulate": lambda: lowrank_optax.accumulate(_galore(), 1),
    "apply_if_finite": lambda: lowrank_optax.apply_if_finite(_galore()),
    "optax's apply_if_finite": lambda: optax.apply_if_finite(_galore(), 3),
    "MultiSteps": lambda: optax.MultiSteps(_galore(), 1).gradient_transformation(),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_is_told_through_every_wrapper(wrapper):
    optimizer, params = WRAPPERS[wrapper](), zeros(SMALL)
    state = jax.eval_shape(optimizer.init, params)

    def lowered(refresh):
        update = functools.partial(optimizer.update, refresh=refresh)
        return jax.jit(update).lower(params, state, params).as_text()

    assert "svd" in lowered(True)
    assert "svd" not in lowered(False)


def test_micro_batches_are_added_without_it():
    accumulation, params = lowrank_optax.accumulate(_galore(), 2), zeros(SMALL)
    state = accumulation.init(params)
    added = {
        refresh: accumulation.add(gradients(params, 0), state, refresh=refresh)
        for refresh in (True, False)
    }
    assert np.sum(counts(added[True])) == 2
    np.testing.assert_array_equal(counts(added[False]), 0)
    assert not np.any(added[False].sums["layers"].coordinates)


@pytest.mark.parametrize("refresh", [np.True_, 1, None, "no"])
def test_what_is_no_python_bool_is_refused(refresh):
    optimizer, params = _galore(), zeros(SMALL)
    with pytest.raises(TypeError, match="refresh must be the Python value True or"):
        optimizer.update(params, optimizer.init(params), params, refresh=refresh)


def test_a_traced_bool_is_refused_and_told_what_to_do():
    optimizer, params = _galore(), zeros(SMALL)

    @jax.jit
    def update(grads, state, params, refresh):
        return optimizer.update(grads, state, params, refresh=refresh)

    message = r"refresh must be .* Under jax.jit close over it, or .* static_argnames"
    with pytest.raises(TypeError, match=message):
        update(params, optimizer.init(params), params, True)


# --- matrices without a basis --------------------------------------------------------

LAYERS, DEAD, STEPS = 3, 1, 400
# Twice in a row, then after 2, 4, 8 ... updates, 128 at most.
ATTEMPTS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 384]


@functools.cache
def histories(born: int, interval: int) -> tuple[np.ndarray, ...]:
    """Whether a refresh is due, and refreshes and failures after it, of all updates.

    Args:
        born: Update at which one matrix of the stack gets its first gradient.
        interval: Updates between two bases of the others.
    """
    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(),
        2,
        basis=lowrank_optax.range_finder(1),
        refresh=lowrank_optax.every(interval),
    )
    params = {"w": jnp.zeros((LAYERS, 5, 4))}
    gradient = lowrank_optax.subspace_value_and_grad(lambda params: 0.0, tx)
    grads = gradients({"w": jnp.zeros((7, LAYERS, 5, 4))}, 0)["w"]

    def step(state, number):
        full = grads[number % len(grads)]
        full = full.at[DEAD].mul(jnp.where(number >= born, 1, 0))
        due = gradient.refresh_due(params, state)
        _, state = tx.update({"w": full}, state)
        subspace = state.subspaces["w"]
        return state, (due, subspace.refreshes, subspace.failures)

    run = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(STEPS))[1])
    return jax.device_get(run(tx.init(params)))


NEVER, SELDOM = 10**6, 10**6


def test_a_matrix_that_never_has_a_gradient_is_asked_ever_more_seldom():
    due, refreshes, failures = histories(NEVER, SELDOM)
    assert list(np.flatnonzero(due)) == ATTEMPTS
    asked = np.flatnonzero(np.diff(failures[:, DEAD], prepend=0))
    assert list(asked) == ATTEMPTS
    assert not np.any(refreshes[:, DEAD])
    assert ATTEMPTS[-1] - ATTEMPTS[-2] == 2**LONGEST_WAIT


def test_no_decomposition_is_spent_on_gradients_that_have_none():
    """An attempt costs a look at the gradient, and not a basis of its whole stack."""
    calls = []

    class Counting:
        def compute(self, matrix, previous, seeds):
            jax.debug.callback(lambda: calls.append(1))
            return lowrank_optax.exact_svd().compute(matrix, previous, seeds)

    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(), 2, basis=Counting(), refresh=lowrank_optax.every(SELDOM)
    )
    alive = gradients({"w": jnp.zeros((LAYERS, 5, 4))}, 0)
    dead = {"w": alive["w"].at[DEAD].set(0)}
    spoiled = {"w": alive["w"].at[DEAD].set(jnp.nan)}
    update, state = jax.jit(tx.update), tx.init(alive)
    expected = 0
    for grads, computes in ((dead, 1), (dead, 0), (spoiled, 0), (dead, 0), (alive, 1)):
        # The fourth is no attempt, the fifth is one.
        _, state = update(grads, state)
        expected += computes
        jax.effects_barrier()
        assert len(calls) == expected
    assert np.all(state.subspaces["w"].refreshes == 1)


def test_its_stack_keeps_its_schedule_meanwhile():
    due, refreshes, failures = histories(NEVER, 5)
    # Renewed at 0, 5, 10 ...: as without it.
    expected = np.arange(STEPS) // 5 + 1
    for layer in (0, 2):
        np.testing.assert_array_equal(refreshes[:, layer], expected)
        assert not np.any(failures[:, layer])
    # Not asked out of turn for the others: a fifth of the updates, and the attempts.
    assert list(np.flatnonzero(due)) == sorted({*range(0, STEPS, 5), *ATTEMPTS})


@pytest.mark.parametrize("born", [1, 3, 70, 129, 200])
def test_a_matrix_gets_its_basis_within_128_updates_of_its_first_gradient(born):
    _, refreshes, failures = histories(born, SELDOM)
    first = int(np.argmax(refreshes[:, DEAD] > 0))
    assert first == min(x for x in ATTEMPTS if x >= born) <= born + 2**LONGEST_WAIT
    # What was is forgotten.
    assert not np.any(failures[first:, DEAD])
    assert np.all(refreshes[first:, DEAD] == 1)


def test_a_renewal_that_fails_is_repeated_at_the_next_update():
    """And a basis that is in use stays in use meanwhile."""
    tx = lowrank_optax.scale_by_low_rank(
        optax.identity(), 2, refresh=lowrank_optax.every(3)
    )
    params = zeros({"w": (6, 5)})
    update, state = jax.jit(tx.update), tx.init(params)
    attempts = []
    for step in range(24):
        dead = 3 <= step < 20
        grads = {"w": gradients(params, step)["w"] * (not dead)}
        before, (_, state) = state, update(grads, state)
        subspace = state.subspaces["w"]
        if dead:
            same = before.subspaces["w"].basis
            np.testing.assert_array_equal(subspace.basis, same)
        if not np.array_equal(counts(state), counts(before)):
            attempts.append(step)
    # Due at 3: at once again, and then on updates that 2, 4, 8 ... divide; 32 is next.
    assert attempts == [0, 3, 4, 6, 8, 16]
    assert int(state.subspaces["w"].failures) == 5


def test_a_failed_renewal_is_due_ahead_at_the_update_that_asks_again():
    """After two failures, at updates of even numbers: ahead=1 is another answer."""
    params = {"w": jnp.zeros((12, 8))}
    optimizer = lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), 2)
    gradient = lowrank_optax.subspace_value_and_grad(
        lambda p: jnp.sum(p["w"] ** 2), optimizer
    )
    state = optimizer.init(params)
    for _ in range(4):
        due = [bool(gradient.due(params, state, ahead)["['w']"]) for ahead in range(5)]
        before = lowrank_optax.subspaces(state)["['w']"].failures
        for ahead, expected in enumerate(due):
            later = state
            for _ in range(ahead):
                later = optimizer.update(params, later, params, refresh=False)[1]
            assert bool(gradient.due(params, later)["['w']"]) == expected
        _, state = optimizer.update(params, state, params)
        assert lowrank_optax.subspaces(state)["['w']"].failures == before + due[0]
