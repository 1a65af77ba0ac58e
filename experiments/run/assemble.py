"""The parts of a pre-training run, from its configuration; nothing is written yet."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data.pipeline import make_data
from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.model.hugging_face import load_llama
from experiments.model.llama import init_params
from experiments.optim.build import build_optimizer
from experiments.optim.schedule import make_schedule
from experiments.run.config import PRETRAINING, complete
from experiments.run.flags import Config
from experiments.run.model_shape import model_of, parameterised
from experiments.run.parts import (
    Parts,
    check_projects,
    check_same_data,
    new_directory,
    read_checkpoint,
    say_changes,
)
from experiments.run.step import data_mesh, replicate
from experiments.run.text import TextWork


def assemble(config: Config, report: Callable[[str], None]) -> Parts[TextWork]:
    """Builds the parts of a run.

    Args:
        config: Checked.
        report: Called with lines that say how long work comes along.

    Raises:
        UserError: If the configuration does not fit the machine, the data, the weights
            or the run to be resumed, or the directory holds another run.
    """
    directory = config.out or new_directory(config.model_name, config.optimizer)
    mesh = data_mesh(config.batch_size, config.accumulate)
    weights = config.initial_weights and load_llama(config.initial_weights)
    config = _with_tokenizer(config, report)
    tokenizer = load_tokenizer(config.tokenizer or "bytes")
    model = model_of(config, tokenizer.vocab_size, weights[0] if weights else None)
    config = complete(config, model.hidden_size)
    resumed, changed = read_checkpoint(config, PRETRAINING, directory, report)
    data = make_data(
        config.data,
        tokenizer,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        validation_spec=config.validation_data,
        text_column=config.text_column,
        report=report,
    )
    work = TextWork(config=config, data=data, model=model, tokenizer=tokenizer)
    check_same_data(resumed, work, config, PRETRAINING, directory)
    schedule = make_schedule(config, config.steps)
    say_changes(resumed, changed, schedule, report)
    tx = build_optimizer(config, schedule, config.seed, config.accumulate)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    check_projects(config, params, tx, [model.hidden_size])
    initial_params = functools.partial(_initial_params, model, config, weights, mesh)
    return Parts(
        settings=PRETRAINING,
        config=config,
        directory=directory,
        work=work,
        schedule=schedule,
        tx=tx,
        mesh=mesh,
        initial_params=initial_params,
        param_shapes=jax.eval_shape(initial_params),
        resumed=resumed,
        changed=changed,
    )


def _with_tokenizer(config, report):
    """Returns the configuration with the tokenizer named where none was given."""
    if config.tokenizer is not None:
        return config
    found = config.initial_weights and find_tokenizer(config.initial_weights)
    if found:
        report(f"tokenizer: {found}, beside the weights")
    return dataclasses.replace(config, tokenizer=str(found or "bytes"))


def _initial_params(model, config, weights, mesh):
    key = jax.random.key(config.seed)
    if weights:
        dtype = jnp.dtype(model.param_dtype)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), weights[1])
        return replicate(parameterised(params, config, key), mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def draw(key):
        return parameterised(init_params(model, key), config, key)

    return jax.jit(draw, out_shardings=whole)(key)
