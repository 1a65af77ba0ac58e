"""The parts of a run, built from its configuration; nothing is written yet."""

import dataclasses
import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lowrank_optax
from experiments.data.pipeline import Data, make_data
from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.errors import UserError
from experiments.model.hugging_face import load_llama
from experiments.model.llama import Params, init_params
from experiments.model.shape import LlamaConfig
from experiments.optim.build import build_optimizer
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.schedule import make_schedule
from experiments.run.changes import Changes, changes, check_changes, told
from experiments.run.checkpoint import RunRecord, read_record
from experiments.run.config import Config, complete
from experiments.run.files import check_is_free
from experiments.run.model_shape import model_of, parameterised
from experiments.run.step import data_mesh, replicate


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        config: With every default filled in.
        directory: Where the results go.
        tokenizer: See :mod:`experiments.data.tokenizers`.
        data: See :mod:`experiments.data.pipeline`.
        model: Shape of the model.
        schedule: Learning rate of embedding, head and norms by update.
        tx: The optimizer.
        mesh: The devices.
        initial_params: Returns the parameters of step 0, one copy per device.
        resumed: The record of the checkpoint to continue from; None: a fresh run.
        changed: What is computed otherwise from there on, see
            :mod:`experiments.run.changes`.
    """

    config: Config
    directory: Path
    tokenizer: Any
    data: Data
    model: LlamaConfig
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    mesh: Mesh
    initial_params: Callable[[], Params]
    resumed: RunRecord | None
    changed: Changes

    @property
    def resumed_step(self) -> int | None:
        """The step of the checkpoint to continue from; None: a fresh run."""
        return None if self.resumed is None else self.resumed.progress["step"]

    def abstract_state(self) -> tuple[Any, Any]:
        """Returns parameters and optimizer state as shapes with shardings."""
        params = jax.eval_shape(self.initial_params)
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            (params, jax.eval_shape(self.tx.init, params)),
        )


def assemble(config: Config, report: Callable[[str], None]) -> Parts:
    """Builds the parts of a run.

    Args:
        config: Checked.
        report: Called with lines that say how long work comes along.

    Raises:
        UserError: If the configuration does not fit the machine, the data, the weights
            or the run to be resumed, or the directory holds another run.
    """
    directory = config.out or _new_directory(config)
    mesh = data_mesh(config.batch_size, config.accumulate)
    weights = config.initial_weights and load_llama(config.initial_weights)
    config = _with_tokenizer(config, report)
    tokenizer = load_tokenizer(config.tokenizer or "bytes")
    model = model_of(config, tokenizer.vocab_size, weights[0] if weights else None)
    config = complete(config, model.hidden_size)
    resumed, changed = _read_checkpoint(config, directory)
    if config.resume and resumed is None:
        report(f"{directory} has no checkpoint: the run starts")
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
    if resumed is not None and resumed.token_digest != data.token_digest:
        raise UserError(
            f"--data {config.data} has other text than the run in {directory} was "
            "started with; give the same files, tokenizer and version of Python"
        )
    schedule = make_schedule(config, config.steps)
    if resumed is not None and changed:
        step = resumed.progress["step"]
        report(
            f"from step {step} on {told(changed)}; the learning rate there is "
            f"{jnp.asarray(schedule(step)).item():.3g}"
        )
    tx = build_optimizer(config, schedule, config.seed, config.accumulate)
    _check_projects(config, model, tx)
    return Parts(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        data=data,
        model=model,
        schedule=schedule,
        tx=tx,
        mesh=mesh,
        initial_params=functools.partial(_initial_params, model, config, weights, mesh),
        resumed=resumed,
        changed=changed,
    )


def _check_projects(config, model, tx):
    """Raises if a low-rank method would leave every block matrix at full size."""
    is_ours = config.optimizer != "optax_galore"
    method = OPTIMIZERS[config.optimizer]
    if not is_ours or "rank" not in method.own or method.adapters:
        return
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    try:
        plans = lowrank_optax.projections(tx, params).values()
    except ValueError as error:
        if config.block_state_bytes is None:
            raise
        raise UserError(
            f"--block-state-bytes {config.block_state_bytes}: {error}"
        ) from error
    if not any(plan.is_projected for plan in plans):
        granularity = config.granularity or 1
        raise UserError(
            f"--rank {config.rank} at granularity {granularity} leaves every block "
            f"matrix at full size; choose a --rank below "
            f"{model.hidden_size // granularity}"
        )


def _new_directory(config):
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{started}-{config.model_name}-{config.optimizer}"


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


def _read_checkpoint(config, directory):
    """Returns the record to continue from and what changes, None and {} without one."""
    record = read_record(directory) if config.resume else None
    if record is None:
        check_is_free(directory, resume=config.resume)
        return None, {}
    changed = changes(record.config, config)
    check_changes(changed, config, directory, record.progress["step"])
    return record, changed
