"""The parts that a run is made of, and what starting or resuming one checks."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import lowrank_optax
from experiments.distribution.mesh import mesh_of_one, whole
from experiments.distribution.processes import of_first
from experiments.distribution.rules import on_mesh, placed_shapes
from experiments.errors import UserError
from experiments.optim.methods import OPTIMIZERS
from experiments.optim.options import OptimizerOptions
from experiments.run.changes import (
    Changes,
    changes,
    check_changes,
    data_changes,
    told,
)
from experiments.run.checkpoint import RunRecord, read_record
from experiments.run.files import check_is_free
from experiments.run.settings import Settings
from experiments.run.work import Work

SomeWork = TypeVar("SomeWork", bound=Work)


@dataclasses.dataclass(frozen=True)
class Parts(Generic[SomeWork]):
    """What a run is made of.

    Attributes:
        settings: Of the command.
        config: With every default filled in.
        directory: Where the results go.
        work: Data, loss and validation.
        schedule: Learning rate of all but the block matrices by update.
        tx: The optimizer.
        mesh: The devices.
        make_params: Returns the parameters of step 0; of a tree of their shardings.
        param_shapes: Their shapes, dtypes and shardings.
        resumed: The record of the checkpoint to continue from; None: a fresh run.
        changed: What is computed otherwise from there on, see
            :mod:`experiments.run.changes`.
    """

    settings: Settings
    config: Any
    directory: Path
    work: SomeWork
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    mesh: Mesh
    make_params: Callable[[Any], Any]
    param_shapes: Any
    resumed: RunRecord | None
    changed: Changes

    @property
    def resumed_step(self) -> int | None:
        """The step of the checkpoint to continue from; None: a fresh run."""
        return None if self.resumed is None else self.resumed.progress["step"]

    def initial_params(self) -> Any:
        """Returns the parameters of step 0, on the mesh."""
        return self.make_params(jax.tree.map(lambda x: x.sharding, self.param_shapes))

    def at_home(self) -> Self:
        """Returns the parts with this process's first device alone as the mesh."""
        mesh = mesh_of_one()
        shardings = jax.tree.map(lambda _: whole(mesh), self.param_shapes)
        shapes = on_mesh(self.param_shapes, shardings)
        return dataclasses.replace(self, mesh=mesh, param_shapes=shapes)

    def abstract_state(self) -> tuple[Any, Any]:
        """Returns parameters and optimizer state as shapes with shardings."""
        return placed_shapes(self.tx, self.param_shapes, self.config.state_memory)


def new_directory(*names: str) -> Path:
    """Returns a directory under runs/ for a run that starts now."""
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    # Processes start at different times.
    return Path("runs") / "-".join([of_first("directory", started), *names])


def read_checkpoint(
    config: Any,
    settings: Settings,
    directory: Path,
    report: Callable[[str], None],
) -> tuple[RunRecord | None, Changes]:
    """Returns the record to continue from and what changes, None and {} without one.

    Args:
        config: Completed.
        settings: Of the command.
        directory: Of the run.
        report: Called with a line where ``--resume`` finds nothing.

    Raises:
        UserError: If the run cannot go on like this, or there is another one.
    """
    record = read_record(directory) if config.resume else None
    if record is None:
        check_is_free(directory, resume=config.resume)
        if config.resume:
            report(f"{directory} has no checkpoint: the run starts")
        return None, {}
    changed = changes(record.config, config, settings)
    step = record.progress["step"]
    check_changes(changed, config, settings, directory, step)
    return record, changed


def check_same_data(
    resumed: RunRecord | None,
    work: Work,
    config: Any,
    settings: Settings,
    directory: Path,
) -> None:
    """Raises UserError if a resumed run would go on with other data.

    Args:
        resumed: The record of the run; None: nothing is resumed.
        work: With the data.
        config: Completed.
        settings: Of the command.
        directory: Of the run.
    """
    if resumed is not None and resumed.token_digest != work.digest:
        changed = data_changes(resumed.config, config, settings)
        raise UserError(
            f"{work.data_flag} has other text than the run in {directory} was "
            f"started with{f' ({told(changed)})' if changed else ''}; give the same "
            "files, tokenizer and version of Python"
        )


def say_changes(
    resumed: RunRecord | None,
    changed: Changes,
    schedule: optax.Schedule,
    report: Callable[[str], None],
) -> None:
    """Says what a resumed run computes otherwise from here on."""
    if resumed is not None and changed:
        step = resumed.progress["step"]
        report(
            f"from step {step} on {told(changed)}; the learning rate there is "
            f"{jnp.asarray(schedule(step)).item():.3g}"
        )


def check_projects(
    options: OptimizerOptions, params: Any, tx: Any, widths: Sequence[int]
) -> None:
    """Raises UserError if a low-rank method would leave all block matrices as they are.

    Args:
        options: Completed.
        params: Shapes of the parameters.
        tx: The optimizer.
        widths: The shorter sides of the block matrices.
    """
    is_ours = options.optimizer != "optax_galore"
    method = OPTIMIZERS[options.optimizer]
    if not is_ours or "rank" not in method.own or method.adapters:
        return
    try:
        plans = lowrank_optax.projections(tx, params).values()
    except ValueError as error:
        if options.block_state_bytes is None:
            raise
        raise UserError(
            f"--block-state-bytes {options.block_state_bytes}: {error}"
        ) from error
    if not any(plan.is_projected for plan in plans):
        granularity = options.granularity or 1
        raise UserError(
            f"--rank {options.rank} at granularity {granularity} leaves every block "
            f"matrix at full size; choose a --rank below "
            f"{max(widths) // granularity}"
        )
