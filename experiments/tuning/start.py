"""The parameters that fine-tuning begins with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.errors import UserError
from experiments.model.adapters import merged, with_adapters
from experiments.model.layers import apart
from experiments.model.peft import WHOLE, load_peft_adapter, rank_of_adapter
from experiments.optim.methods import OPTIMIZERS
from experiments.tuning.answer_work import AnswerWork
from experiments.tuning.encoder_work import EncoderWork
from experiments.tuning.flags import TuningConfig
from experiments.tuning.frozen import leaf_name


def with_rank_of_adapter(config: TuningConfig) -> TuningConfig:
    """Returns the configuration; where LoRA goes on with an adapter, with its rank.

    Raises:
        UserError: If the adapter cannot be read, or ``--rank`` is another one.
    """
    if config.adapter is None or not _goes_on(config):
        return config
    rank = rank_of_adapter(config.adapter)
    if config.rank not in (None, rank):
        raise UserError(
            f"--rank {config.rank}: the adapter in {config.adapter} has rank {rank}, "
            "and lora goes on with it; leave --rank out"
        )
    return dataclasses.replace(config, rank=rank)


def pretrained(work: EncoderWork | AnswerWork) -> Any:
    """Returns the pre-trained model's parameters, in stacks, in the run's dtype."""
    return _in_dtype(work.config, work.pretrained())


def start(work: EncoderWork | AnswerWork) -> Any:
    """Returns the parameters of step 0.

    With ``--adapter``, LoRA trains the adapter's own factors, those of other methods
    are merged into the matrices. A pooler that the adapter has as a whole gets new
    factors beside it.

    Raises:
        UserError: If the model or the adapter cannot be read, or the adapter is not
            one of the model.
    """
    config = work.config
    params, factors = work.pretrained(), {}
    if config.adapter is not None:
        found, scale = load_peft_adapter(config.adapter, params, work.model)
        if _goes_on(config):
            params, factors = found["model"], _scaled(found["adapters"], scale)
        else:
            params = merged(found, scale)
    params = _in_dtype(config, params)
    kind = OPTIMIZERS[config.optimizer].adapters
    if kind is None:
        return params if config.scan_layers else apart(params)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    started = with_adapters(params, kind, config.rank or 1, key, work.draw)
    if not factors:
        return started
    new = {
        name: pair
        for name, pair in started["adapters"].items()
        if name.split(".")[0] in WHOLE
    }
    return {**started, "adapters": {**new, **factors}}


def _goes_on(config: TuningConfig) -> bool:
    """Returns whether an adapter is trained, and not merged."""
    return OPTIMIZERS[config.optimizer].adapters == "lora"


def _scaled(factors: Any, scale: float) -> Any:
    """Returns factors whose product is the scaled one."""
    return {
        name: {"down": pair["down"], "up": scale * pair["up"]}
        for name, pair in factors.items()
    }


def _in_dtype(config: TuningConfig, params: Any) -> Any:
    if config.param_dtype is None:
        return params
    dtype = jnp.dtype(config.param_dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if _is_head(path) else jnp.asarray(x, dtype), params
    )


def _is_head(path: tuple) -> bool:
    return leaf_name(path).startswith("classifier/")
