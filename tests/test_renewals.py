"""Which bases the next steps renew: once each time, known ahead, over checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.training.renewals import (
    AHEAD,
    ALWAYS,
    DUE,
    Renewals,
    first_register,
    next_register,
)

# The steps whose updates need a new basis.
DUE_AT = {"a": [0, 10], "b": [0, 6, 12]}
STEPS = 16
# Both are due at the first step, and neither at the two behind it.
ONCE = jnp.array([True, False, False])


def due_after(step, renewed):
    """What the state behind a step says: due until it has been renewed."""
    row = []
    for steps in DUE_AT.values():
        left = [x for x in steps if x > step or not renewed[x]]
        row.append(DUE if left and left[0] <= step + 1 + AHEAD else 0)
    return jnp.array(row, jnp.int8)


def run(steps, register, start=0, renewed=None):
    """Returns what each step renews, on the host, and the device's register."""
    host, found = Renewals(register), []
    renewed = dict.fromkeys(range(STEPS), False) if renewed is None else renewed
    update, none_left = jax.jit(next_register), jnp.zeros(len(DUE_AT), bool)
    for step in range(start, steps):
        renews = host.next()
        found.append(renews.tolist())
        # The device knows the same.
        np.testing.assert_array_equal(np.asarray(register[0]) > 0, renews)
        renewed[step] = True
        due = due_after(step, renewed)
        host.observe(due)
        register = update(register, jnp.asarray(renews), none_left, due)
    return found, register


def test_bases_are_renewed_once_each_time_they_are_due():
    found, _ = run(STEPS, first_register([ONCE, ONCE]))
    for number, steps in enumerate(DUE_AT.values()):
        assert [step for step, x in enumerate(found) if x[number]] == steps


def test_renewals_go_on_after_a_checkpoint_as_they_would_have():
    whole, _ = run(STEPS, first_register([ONCE, ONCE]))
    for stop in range(1, 14):
        renewed = dict.fromkeys(range(STEPS), False)
        first, register = run(stop, first_register([ONCE, ONCE]), 0, renewed)
        saved = np.asarray(register)
        second, _ = run(STEPS, jnp.asarray(saved), stop, renewed)
        assert first + second == whole, stop


def test_a_basis_that_is_soon_due_again_is_renewed_at_every_step():
    register = first_register([jnp.ones(3, bool), ONCE])
    host = Renewals(register)
    for _ in range(6):
        assert host.next()[0]
        due = jnp.array([ALWAYS, 0], jnp.int8)
        host.observe(due)
        renewed = jnp.array([True, False])
        register = next_register(register, renewed, ~renewed, due)
        assert register[0, 0] == ALWAYS


def test_what_a_step_should_have_renewed_is_asked_for_until_it_is():
    """An update that is left out leaves its bases due: at each of the next steps."""
    register = first_register([ONCE])
    host, found = Renewals(register), []
    for step in range(12):
        found.append(bool(host.next()[0]))
        # The first update of all is that of step 7.
        renewed = jnp.array([step == 7])
        is_left = jnp.array([step < 7])
        due = jnp.where(is_left, DUE, 0).astype(jnp.int8)
        register = next_register(register, renewed, is_left, due)
        host.observe(register[-1])
    assert found == [True] + [False] * AHEAD + [True] * 7 + [False] * 2


def test_a_step_does_not_wait_for_the_two_before_it():
    host = Renewals(first_register([ONCE]))

    class Pending:
        def __array__(self, *args, **kwargs):
            raise AssertionError("waited for")

    for _ in range(AHEAD):
        host.next()
        host.observe(Pending())
    host.next()
