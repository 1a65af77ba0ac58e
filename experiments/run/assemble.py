"""The parts of a pre-training run, from its configuration; nothing is written yet."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.pipeline import make_data
from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.distribution.host_memory import check_memory
from experiments.distribution.mesh import make_mesh
from experiments.distribution.placement import own_rows
from experiments.distribution.rules import on_mesh, parameter_shardings
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
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    check_memory(config.state_memory, mesh)
    weights = config.initial_weights and load_llama(config.initial_weights)
    config = _with_tokenizer(config, report)
    tokenizer = load_tokenizer(config.tokenizer or "bytes")
    size = tokenizer.used_vocab_size if weights else tokenizer.vocab_size
    model = model_of(config, size, weights[0] if weights else None)
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
        rows=own_rows(mesh, config.batch_size),
        report=report,
    )
    work = TextWork(config=config, data=data, model=model, tokenizer=tokenizer)
    check_same_data(resumed, work, config, PRETRAINING, directory)
    schedule = make_schedule(config, config.steps)
    say_changes(resumed, changed, schedule, report)
    tx = build_optimizer(config, schedule, config.seed, config.accumulate)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    check_projects(config, params, tx, [model.hidden_size])
    start = functools.partial(_start, model, config)
    first = (jax.random.key(config.seed), _weights(model, weights))
    shapes = jax.eval_shape(start, *first)
    shardings = parameter_shardings(shapes, mesh, report)
    return Parts(
        settings=PRETRAINING,
        config=config,
        directory=directory,
        work=work,
        schedule=schedule,
        tx=tx,
        mesh=mesh,
        make_params=functools.partial(_initial_params, start, *first),
        param_shapes=on_mesh(shapes, shardings),
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


def _weights(model, weights):
    """Returns the initial weights in the run's dtype, on the host; None: none."""
    if not weights:
        return None
    dtype = jnp.dtype(model.param_dtype)
    return jax.tree.map(lambda x: np.asarray(x, dtype), weights[1])


def _start(model, config, key, weights):
    """Returns the parameters of step 0; it is traced."""
    params = init_params(model, key) if weights is None else weights
    return parameterised(params, config, key)


def _initial_params(start, key, weights, shardings):
    """Returns the parameters of step 0, each device its share."""
    if weights is not None:
        mesh = jax.tree.leaves(shardings)[0].mesh
        weights = jax.device_put(weights, parameter_shardings(weights, mesh))
    return jax.jit(start, out_shardings=shardings)(key, weights)
