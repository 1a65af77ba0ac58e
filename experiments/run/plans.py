"""The memory of a run beforehand: its optimizer on the shapes of its parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from experiments.distribution.host_memory import DEVICE
from experiments.distribution.mesh import planned_mesh
from experiments.distribution.rules import memory_plan, on_mesh, parameter_shardings
from experiments.errors import UserError
from experiments.model.hugging_face import read_shape
from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig
from experiments.optim.build import build_optimizer
from experiments.optim.methods import BUDGETED, OPTIMIZERS
from experiments.run.config import complete
from experiments.run.flags import Config
from experiments.run.model_shape import model_of, parameterised
from experiments.run.unused import unused

_LOW_BIT = {"moment_bits": 8, "basis_bits": 8, "vocabulary_optimizer": "low_bit"}


def plan_of(
    config: Config,
    vocab_size: int,
    report: Callable[[str], None] | None = None,
) -> Any:
    """Returns what a run keeps: parameters, gradients and the optimizer's state.

    Args:
        config: Of the run, checked. With a mesh the plan has the bytes of one device
            too, whatever devices there are here.
        vocab_size: Tokens of its tokenizer.
        report: Called with a line for each leaf that the mesh does not cut.

    Returns:
        What :func:`lowrank_optax.memory_plan` returns.

    Raises:
        UserError: If two values contradict each other, the mesh does not divide an
            axis, or the optimizer's state does not fit ``--block-state-bytes``.
    """
    _, tx, params = shapes_of(config, _model(config, vocab_size))
    text = config.mesh
    if text is None and config.state_memory != DEVICE:
        # Of one device: what is not in its memory counts nothing.
        text = "data=1"
    if text is not None:
        mesh = planned_mesh(text)
        params = on_mesh(params, parameter_shardings(params, mesh, report))
    try:
        return memory_plan(tx, params, config.state_memory)
    except ValueError as error:
        raise UserError(f"{config.optimizer}: {error}") from error


def shapes_of(
    config: Config, model: LlamaConfig
) -> tuple[Config, optax.GradientTransformation, Any]:
    """Returns the completed configuration, the optimizer and the parameters' shapes.

    Args:
        config: Of the run, checked.
        model: Shape of its model.

    Raises:
        UserError: If two values contradict each other.
    """
    config = complete(config, model.hidden_size)
    params = jax.eval_shape(
        lambda key: parameterised(init_params(model, key), config, key),
        jax.random.key(0),
    )
    schedule = optax.constant_schedule(config.learning_rate)
    tx = build_optimizer(config, schedule, config.seed, config.accumulate)
    return config, tx, params


def on_a_device(plan: Any) -> Any:
    """Returns the bytes that one device has of parameters, gradients and state.

    Args:
        plan: From :func:`lowrank_optax.memory_plan`; where it knows no shardings, one
            device has everything.
    """
    return plan.per_device or plan.bytes


def adamw_of(config: Config) -> Config:
    """Returns the run with plain AdamW for all parameters."""
    plain = Config()
    kept = {"model", "initial_weights", "kv_heads", "tied_embeddings", "param_dtype"}
    kept |= {"mesh"}
    same = {name: getattr(config, name) for name in kept}
    return dataclasses.replace(plain, optimizer="adamw", **same)


def every_optimizer(config: Config) -> Mapping[str, Config]:
    """Returns runs like this one with each optimizer, and with its state in 8 bits.

    Each has those of the flags that have an effect in it. Where the run has bits of its
    own, the rows of 8 bits are left out.
    """
    rows = {}
    has_bits = config.moment_bits or config.basis_bits
    for name, method in OPTIMIZERS.items():
        rows[name] = _with_effect(dataclasses.replace(config, optimizer=name))
        if method.codes and not has_bits:
            low = dataclasses.replace(config, optimizer=name, **_LOW_BIT)
            rows[f"{name}, 8 bits"] = _with_effect(low)
    if config.block_state_bytes is not None:
        rows = {k: v for k, v in rows.items() if v.optimizer in BUDGETED}
    return rows


def _with_effect(config: Config) -> Config:
    """Returns the configuration without flags that have no effect."""
    plain = Config()
    names = unused(config)
    return dataclasses.replace(config, **{x: getattr(plain, x) for x in names})


def _model(config: Config, vocab_size: int) -> LlamaConfig:
    weights = config.initial_weights
    return model_of(config, vocab_size, read_shape(weights) if weights else None)
