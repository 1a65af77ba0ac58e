"""The model of a run: the shape of its weights, and what its flags ask for."""

import dataclasses

import jax

from experiments.errors import UserError
from experiments.model.adapters import with_adapters
from experiments.model.layers import apart
from experiments.model.llama import Params
from experiments.model.shape import LlamaConfig, preset
from experiments.optim.methods import OPTIMIZERS
from experiments.run.flags import Config


def model_of(
    config: Config, vocab_size: int, of_weights: LlamaConfig | None
) -> LlamaConfig:
    """Returns the shape of a run's model.

    Args:
        config: Of the run.
        vocab_size: Tokens of the run's tokenizer.
        of_weights: Shape of ``--initial-weights``; None: there are none.

    Raises:
        UserError: If the shape is impossible, or the tokenizer has tokens that the
            initial weights have not.
    """
    numerics = {
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
        "max_positions": config.sequence_length,
    }
    if config.param_dtype is not None:
        numerics["param_dtype"] = config.param_dtype
    if of_weights is None:
        if config.kv_heads is not None:
            numerics["num_kv_heads"] = config.kv_heads
        return preset(
            config.model,
            vocab_size,
            tie_embeddings=config.tied_embeddings,
            **numerics,
        )
    numerics["max_positions"] = max(of_weights.max_positions, config.sequence_length)
    if vocab_size > of_weights.vocab_size:
        raise UserError(
            f"--tokenizer {config.tokenizer} has {vocab_size} tokens, the "
            f"model in {config.initial_weights} only {of_weights.vocab_size}; give the "
            "tokenizer that it was trained with"
        )
    return dataclasses.replace(of_weights, **numerics)


def parameterised(params: Params, config: Config, key: jax.Array) -> Params:
    """Returns a LLaMA's parameters as a run trains them: with adapters, or apart."""
    kind = OPTIMIZERS[config.optimizer].adapters
    if kind is None:
        return params if config.scan_layers else apart(params)
    return with_adapters(params, kind, config.rank or 1, jax.random.fold_in(key, 1))
