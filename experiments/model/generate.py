"""Continuing a sequence of tokens with a trained model, for small samples."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from experiments.model.llama import Params, apply
from experiments.model.shape import LlamaConfig


def generate(
    config: LlamaConfig,
    params: Params,
    prompt_tokens: Sequence[int] | np.ndarray,
    length: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Appends ``length`` tokens to a prompt of P tokens.

    There is no cache: every new token costs a forward pass over all P + length
    positions, in one compiled function of fixed shape. The result is a function of the
    arguments alone.

    Args:
        config: The model.
        params: Its parameters.
        prompt_tokens: At least one token, each in [0, V).
        length: Tokens to append, >= 1. The model has no limit, but sequences longer
            than those of its training degrade.
        temperature: 0 takes the likeliest token; above 0, the logits are divided by it
            and the token is drawn. >= 0.
        key: A key of :func:`jax.random.key`; needed when the temperature is above 0.

    Returns:
        (P + length,) int32, the prompt first.

    Raises:
        UserError: If an argument is out of its range or the key is missing.
    """
    prompt = np.asarray(prompt_tokens, np.int32)
    if prompt.size == 0 or prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise UserError(
            f"generate: the prompt {prompt.tolist()} must hold at least one token, "
            f"each from 0 to {config.vocab_size - 1}"
        )
    if length < 1 or temperature < 0:
        raise UserError(
            f"generate: length is {length} and temperature {temperature}; "
            "give a length of at least 1 and a temperature of at least 0"
        )
    if temperature > 0 and key is None:
        raise UserError("generate: a temperature above 0 draws tokens; give a key")
    window = np.pad(prompt, (0, length))
    return np.asarray(
        _fill(config, temperature == 0, params, window, prompt.size, temperature, key)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(config, greedy, params, window, start, temperature, key):
    """Replaces tokens start.. of the window, (T,) int32, from left to right."""

    def fill_one(position, window):
        logits = apply(config, params, window[None])[0, position - 1]
        if greedy:
            token = jnp.argmax(logits)
        else:
            drawn_with = jax.random.fold_in(key, position)
            token = jax.random.categorical(drawn_with, logits / temperature)
        return window.at[position].set(token.astype(window.dtype))

    return jax.lax.fori_loop(start, window.size, fill_one, jnp.asarray(window))
