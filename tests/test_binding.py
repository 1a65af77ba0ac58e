"""``bind``: what an optimizer decides is asked once, and lives with the optimizer."""

import gc
import weakref

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax
from lowrank_optax.binding.optimizer import bind
from lowrank_optax.rules.schedules import Every

PARAMS = {"w": jnp.ones((24, 16)), "b": jnp.ones(16)}


def counting(optimizer):
    """Returns the optimizer, and a list with an entry for each call of its init."""
    calls = []

    def init(params):
        calls.append(None)
        return optimizer.init(params)

    update = optax.with_extra_args_support(optimizer).update
    return optax.GradientTransformationExtraArgs(init, update), calls


def test_an_optimizer_is_bound_once_for_parameters_of_a_shape():
    optimizer, calls = counting(lowrank_optax.galore(0.1, rank=4))
    first = bind(optimizer, PARAMS)
    assert bind(optimizer, jax.tree.map(lambda x: 2 * x, PARAMS)) is first
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"w": jnp.ones((24, 16)), "v": jnp.ones(16)},
        {"w": jnp.ones((16, 24)), "b": jnp.ones(16)},
        {"w": jnp.ones((24, 16), jnp.bfloat16), "b": jnp.ones(16)},
    ],
)
def test_other_parameters_are_bound_anew(other):
    optimizer, calls = counting(lowrank_optax.galore(0.1, rank=4))
    bind(optimizer, PARAMS)
    bind(optimizer, other)
    assert len(calls) == 2


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_binds_its_optimizer_once_for_each_kind_of_shapes(micro_batches):
    """Twice at most: sums know the parameters' shapes, and not where they are."""
    optimizer, calls = counting(lowrank_optax.adarankgrad(0.1, rank=4))
    step = lowrank_optax.train_step(
        lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2),
        optimizer,
        micro_batches=micro_batches,
    )
    state = step.init(PARAMS)
    step.compile(PARAMS, state, jnp.ones((8, 24)))
    # One of them is the state's own.
    assert len(calls) <= 3


def test_a_number_of_an_outer_trace_is_not_kept():
    """``bind`` inside jit, by an optimizer that was made outside."""
    kept = []
    optimizer = optax.GradientTransformation(
        lambda params: lowrank_optax.galore(0.1, rank=4, update_proj_gap=kept[-1]).init(
            params
        ),
        lambda updates, state, params=None: (updates, state),
    )

    def interval(gap):
        kept.append(gap)
        (who,) = bind(optimizer, PARAMS).transformations
        assert isinstance(who.parts.refresh, Every)
        return who.parts.refresh.interval

    for gap in (7, 9):
        assert int(jax.jit(lambda x: interval(x))(gap)) == gap


def test_a_budget_counts_the_bytes_of_the_format_around_it():
    """The same optimizer, as it is and inside ``low_bit``."""
    inner = lowrank_optax.accumulate(
        lowrank_optax.galore(0.1, lowrank_optax.budget("20kB")), 2
    )
    params = {"w": jnp.ones((96, 64))}
    for optimizer in (inner, lowrank_optax.low_bit(inner, 8, 8, min_size=1), inner):
        state = optimizer.init(params)
        (rank,) = lowrank_optax.capacities(state).values()
        sums = optax.tree.get(state, "sums")
        assert sums["w"].coordinates.shape == (96, rank)


def test_what_was_decided_ends_with_the_optimizer():
    optimizer = lowrank_optax.galore(0.1, rank=4)
    binding = weakref.ref(bind(optimizer, PARAMS))
    assert binding() is not None
    del optimizer
    gc.collect()
    assert binding() is None


def test_an_init_that_cannot_be_kept_works_too():
    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, params):
            return lowrank_optax.galore(0.1, rank=4).init(params)

    optimizer = optax.GradientTransformation(Unhashable(), optax.identity().update)
    assert (
        bind(optimizer, PARAMS).projected.keys()
        == bind(lowrank_optax.galore(0.1, rank=4), PARAMS).projected.keys()
    )
