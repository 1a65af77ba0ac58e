"""What the optimizers have in fine-tuning, where the flags are silent."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.arguments import groups_of, parse_arguments
from experiments.optim import options, tuning
from experiments.optim.build import build_optimizer
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.schedule import make_schedule
from experiments.optim.tuning import TUNING, TuningOptions, with_tuning_defaults


def filled(**flags):
    found = TuningOptions(**flags)
    return dataclasses.replace(found, **with_tuning_defaults(found, steps=50))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_is_made_from_the_defaults(name):
    flags = filled(optimizer=name)
    assert TUNING[name].keys() <= {"block_scale", *OPTIMIZERS[name].own}
    assert flags.block_scale == TUNING[name]["block_scale"]
    assert all(getattr(flags, own) is not None for own in OPTIMIZERS[name].own)
    kernel = jax.ShapeDtypeStruct((2, 16, 24), jnp.float32)
    params = {"blocks": {"mlp": {"up": kernel}}}
    tx = build_optimizer(flags, make_schedule(flags, 50))
    assert jax.eval_shape(tx.init, params)


def test_ranks_are_eight_or_as_given_and_may_halve():
    assert (filled().rank, filled().min_rank) == (8, 4)
    assert (filled(rank=1).rank, filled(rank=1).min_rank) == (1, 1)
    assert filled(rank=6, min_rank=2).min_rank == 2
    assert filled(optimizer="galore", rank=4).min_rank is None
    assert filled(block_state_bytes="1MB").rank is None


def test_intervals_that_are_given_move_the_bounds_that_are_not():
    assert filled(max_refresh_interval=10).min_refresh_interval == 10
    assert filled(min_refresh_interval=900).max_refresh_interval == 900


def test_a_short_warm_up_and_a_line_down_to_zero():
    schedule = make_schedule(filled(learning_rate=1.0), 50)
    rates = [np.asarray(schedule(count)).item() for count in range(50)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[-1] == pytest.approx(0)
    assert rates[26] == pytest.approx(23 / 47)


def test_flags_with_other_defaults_stand_in_the_groups_of_the_same_names():
    assert list(groups_of(TuningOptions)) == list(groups_of(options.OptimizerOptions))
    assert groups_of(TuningOptions)["schedule"] is tuning.ScheduleFlags
    found = parse_arguments(TuningOptions, "", ["--rank", "4", "--no-compact"])
    assert found == TuningOptions(rank=4, compact=False)
    assert TuningOptions().compact


def test_the_help_of_an_option_of_one_method_names_its_default():
    source = inspect.getsource(tuning.OneMethodFlags).replace("    #: ", "")
    adarankgrad = filled()
    for name in ("threshold", "min_refresh_interval", "max_refresh_interval"):
        text = " ".join(source[: source.index(f"{name}: ")].split())
        stated = re.findall(r"None: (\S+) of adarankgrad", text)[-1]
        assert float(stated) == getattr(adarankgrad, name)
