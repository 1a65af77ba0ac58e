"""The parts of a fine-tuning run, from its configuration; nothing is written yet."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.data.tokenizers import find_tokenizer, load_tokenizer
from experiments.distribution.host_memory import check_memory
from experiments.distribution.mesh import make_mesh
from experiments.distribution.rules import on_mesh, parameter_shardings
from experiments.errors import UserError
from experiments.model.adapters import check_adapter_rank
from experiments.model.encoder_files import read_encoder_shape
from experiments.model.hugging_face import read_shape
from experiments.optim.build import build_optimizer
from experiments.optim.schedule import make_schedule
from experiments.run.memory import block_leaves
from experiments.run.parts import (
    Parts,
    check_projects,
    check_same_data,
    new_directory,
    read_checkpoint,
    say_changes,
)
from experiments.tasks.answer_data import first_answered, make_answer_data
from experiments.tasks.answers import Prompts, chat_of
from experiments.tasks.embedded import embedded_rows
from experiments.tasks.encoder_data import make_encoder_data
from experiments.tasks.parts import read_parts
from experiments.tasks.rows import Rows
from experiments.tasks.table import TASKS, TaskKind
from experiments.tuning.answer_work import AnswerWork
from experiments.tuning.config import TUNING, complete
from experiments.tuning.encoder_work import EncoderWork
from experiments.tuning.fit import find_model_for
from experiments.tuning.flags import TuningConfig
from experiments.tuning.frozen import check_frozen, groups_of
from experiments.tuning.start import start, with_rank_of_adapter

_EVAL_EXAMPLES = 100
_LONGEST = 512


def assemble(
    config: TuningConfig, report: Callable[[str], None]
) -> Parts[EncoderWork] | Parts[AnswerWork]:
    """Builds the parts of a run.

    Args:
        config: Checked.
        report: Called with lines that say how long work comes along.

    Raises:
        UserError: If the configuration does not fit the machine, the model, the data
            or the run to be resumed, or the directory holds another run.
    """
    directory = config.out or new_directory(
        config.model_name, config.task, config.optimizer
    )
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    check_memory(config.state_memory, mesh)
    path, task = find_model_for(config.task, config.model), TASKS[config.task]
    rows, validation = _rows(config, task)
    make = _answer_work if task.kind == "answer" else _encoder_work
    work = make(with_rank_of_adapter(config), path, task, rows, validation)
    config = work.config
    resumed, changed = read_checkpoint(config, TUNING, directory, report)
    check_same_data(resumed, work, config, TUNING, directory)
    schedule = make_schedule(config, config.steps or 1)
    say_changes(resumed, changed, schedule, report)
    params = jax.eval_shape(functools.partial(start, work))
    shardings = parameter_shardings(params, mesh, report)
    check_frozen(config, params)
    if config.save_adapter is not None and config.save_adapter >= 1:
        check_adapter_rank(params, int(config.save_adapter))
    tx = build_optimizer(
        config,
        schedule,
        config.seed,
        config.accumulate,
        head_schedule=_head_schedule(config, task),
        groups_of=functools.partial(groups_of, config),
    )
    widths = [min(leaf.shape[-2:]) for leaf in block_leaves(params)]
    check_projects(config, params, tx, widths)
    return Parts(
        settings=TUNING,
        config=config,
        directory=directory,
        work=work,
        schedule=schedule,
        tx=tx,
        mesh=mesh,
        make_params=lambda shardings: jax.device_put(start(work), shardings),
        param_shapes=on_mesh(params, shardings),
        resumed=resumed,
        changed=changed,
    )


def _rows(config: TuningConfig, task: TaskKind) -> tuple[Rows, Mapping[str, Rows]]:
    if config.train is None:
        train, validation = embedded_rows()
        parts = {task.splits[0]: validation}
    else:
        train, parts = read_parts(task, config.train, _names(config.validation))
    most = config.validation_examples
    return train, {name: _first(most, rows) for name, rows in parts.items()}


def _first(most: int | None, rows: Rows) -> Rows:
    """Returns the first rows; None: all."""
    if most is None or most >= len(rows):
        return rows
    return rows.take(range(most), f"the first {most:,} of {rows.name}")


def _names(text: str | None) -> Sequence[str]:
    return tuple(text.split(",")) if text else ()


def _encoder_work(config, path, task, rows, validation):
    shape = read_encoder_shape(path)
    data = make_encoder_data(
        task,
        rows,
        validation,
        directory=path,
        shape=shape,
        text_columns=_names(config.text_columns),
        label_column=config.label_column,
        max_length=config.max_length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    config = complete(config, data.steps_per_epoch)
    labels = len(data.label_names) if task.kind == "classes" else 1
    shape = read_encoder_shape(path, labels)
    model = dataclasses.replace(shape, **_numerics(config), **_dropout(config))
    return EncoderWork(config=config, task=task, data=data, model=model, path=path)


def _numerics(config: TuningConfig) -> dict[str, Any]:
    """Returns the run's dtypes and remat, as fields of a model's shape."""
    found: dict[str, Any] = {
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
    }
    if config.param_dtype is not None:
        found["param_dtype"] = config.param_dtype
    return found


def _dropout(config: TuningConfig) -> dict[str, Any]:
    """Returns the run's dropout, as fields of an encoder's shape."""
    places = ("hidden_dropout", "attention_dropout", "classifier_dropout")
    return {} if config.dropout is None else dict.fromkeys(places, config.dropout)


def _answer_work(config, path, task, rows, validation):
    model = read_shape(path)
    file = find_tokenizer(path)
    if file is None:
        raise UserError(
            f"{path} has no tokenizer; put the model's tokenizer.json or "
            "tokenizer.model beside its weights"
        )
    tokenizer = load_tokenizer(str(file))
    if tokenizer.used_vocab_size > model.vocab_size:
        raise UserError(
            f"{file} has {tokenizer.used_vocab_size} tokens, the model beside it only "
            f"{model.vocab_size}; put the tokenizer there that it was trained with"
        )
    prompts = Prompts(config.task, tokenizer, chat_of(tokenizer, config.prompt))
    columns = _names(config.text_columns) or task.text_columns
    if len(columns) > 1:
        raise UserError(
            f"--text-columns {config.text_columns}: --task {config.task} reads one "
            "column, that of the question"
        )
    answer = config.label_column or task.label_column
    length = config.max_length or min(model.max_positions, _LONGEST)
    if length > model.max_positions:
        raise UserError(
            f"--max-length {length}: {path} has {model.max_positions} positions; give "
            "at most that"
        )
    config = dataclasses.replace(config, max_length=length)
    data = make_answer_data(
        prompts,
        rows,
        validation,
        text_column=columns[0],
        answer_column=answer,
        vocab_size=model.vocab_size,
        max_length=length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    config = complete(config, data.steps_per_epoch)
    most = config.eval_examples or _EVAL_EXAMPLES
    return AnswerWork(
        config=config,
        task=task,
        data=data,
        model=dataclasses.replace(model, **_numerics(config)),
        path=path,
        tokenizer=tokenizer,
        prompts=prompts,
        rows={
            name: first_answered(prompts, part, most, columns[0], answer, length)
            for name, part in validation.items()
        },
        columns=(columns[0], answer),
    )


def _head_schedule(config: TuningConfig, task: TaskKind):
    if task.kind == "answer":
        return None
    peak = config.head_learning_rate or config.learning_rate
    return make_schedule(
        dataclasses.replace(config, learning_rate=peak), config.steps or 1
    )
