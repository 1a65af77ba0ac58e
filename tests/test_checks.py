"""A caller's wrong number or rule is one line, where the method is made."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax.checks import as_count

DECAYS = {
    "b1": lambda x: lowrank_optax.adarankgrad(1e-3, b1=x),
    "b2": lambda x: lowrank_optax.galore(1e-3, b2=x),
    "beta": lambda x: lowrank_optax.sumo(1e-3, beta=x),
    "rms": lambda x: lowrank_optax.low_rank_muon(1e-3, rms=x),
    "decay": lambda x: lowrank_optax.on_convergence(decay=x),
    "smoothing": lambda x: lowrank_optax.energy_rank(8, 0.1, smoothing=x),
    "rho": lambda x: lowrank_optax.power_iteration(rho=x),
}
COUNTS = {
    "rank": lambda k: lowrank_optax.galore(1e-3, rank=k),
    "max_rank": lambda k: lowrank_optax.energy_rank(k, 0.1, min_rank=1),
    "granularity": lambda k: lowrank_optax.vlorp(1e-3, granularity=k),
    "ns_steps": lambda k: lowrank_optax.sumo(1e-3, ns_steps=k),
    "every_k": lambda k: lowrank_optax.accumulate(optax.sgd(1.0), k),
    "min_size": lambda k: lowrank_optax.low_bit(optax.sgd(1.0), min_size=k),
}


@pytest.mark.parametrize("number", [1.0, -0.1, math.nan, np.float32(3), np.int64(1)])
@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_is_inside_zero_and_one_whatever_type_it_has(name, number):
    with pytest.raises(ValueError, match=rf"{name} must be inside \[0, 1\), got"):
        DECAYS[name](number)


@pytest.mark.parametrize("number", [0, -1, np.int32(0), 2.5, True, np.ones(()), "2"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_whole_number(name, number):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be a"):
        COUNTS[name](number)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_may_be_an_integer_of_numpy(name):
    COUNTS[name](np.int64(2))


def test_a_count_of_numpy_becomes_pythons():
    assert type(as_count("rank", np.int16(3))) is int


@pytest.mark.parametrize("interval", [0, -3.0, np.int64(-3), math.nan])
def test_an_interval_is_at_least_one(interval):
    with pytest.raises(ValueError, match="interval must be >= 1, got"):
        lowrank_optax.every(interval)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"basis": "svd"},
            r"basis must be a rule, such as range_finder\(\), got 'svd'",
        ),
        ({"basis": lowrank_optax.exact_svd}, "basis must be a rule"),
        ({"refresh": 200}, r"refresh must be a rule, such as every\(200\), got 200"),
        ({"residual": 1.0}, r"residual must be a rule, such as sign_residual\(\)"),
        ({"residual": optax.sgd(1.0)}, "residual must be a rule"),
    ],
)
def test_what_is_no_rule_is_refused_where_the_method_is_made(part, message):
    with pytest.raises(TypeError, match=message):
        lowrank_optax.scale_by_low_rank(optax.scale_by_adam(), 4, **part)


def test_the_residual_of_low_rank_muon_is_a_number():
    with pytest.raises(TypeError, match="residual is a number here, the weight"):
        lowrank_optax.low_rank_muon(1e-3, residual=lowrank_optax.sign_residual())


@pytest.mark.parametrize(
    "make",
    [
        lambda kinds: lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(), 4, moments=kinds
        ),
        lambda kinds: lowrank_optax.low_bit(optax.scale_by_adam(), moments=kinds),
    ],
)
def test_a_kind_of_moments_that_is_none_is_refused(make):
    with pytest.raises(ValueError, match=r"moments\['mu'\] must be one of .*'frist'"):
        make({"mu": "frist"})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (
            "power_iterations",
            lambda rate, number: lowrank_optax.galore(
                rate, 4, basis=lowrank_optax.range_finder(power_iterations=number)
            ),
        ),
        (
            "seed",
            lambda rate, number: lowrank_optax.low_bit(optax.sgd(rate), seed=number),
        ),
        (
            "block",
            lambda rate, number: lowrank_optax.low_bit(optax.sgd(rate), block=number),
        ),
    ],
)
def test_an_injected_number_that_makes_a_program_is_named(name, method):
    params = {"w": jnp.ones((64, 16))}
    injected = optax.inject_hyperparams(method)(rate=0.1, number=2)
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*static_args"):
        injected.init(params)
    known = optax.inject_hyperparams(method, static_args=("number",))
    known(rate=0.1, number=2).init(params)
