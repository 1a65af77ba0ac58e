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
    top_p: float = 1.0,
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
        top_p: Tokens are drawn from the likeliest ones alone, as few as have this
            probability together; in (0, 1], where 1 is all tokens.
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
    if not 0 < top_p <= 1:
        raise UserError(f"generate: top_p is {top_p}; give one above 0 and at most 1")
    if temperature > 0 and key is None:
        raise UserError("generate: a temperature above 0 draws tokens; give a key")
    window = np.pad(prompt, (0, length))
    draw = None if temperature == 0 else (temperature, top_p, key)
    return np.asarray(_fill(config, params, window, prompt.size, draw))


@functools.partial(jax.jit, static_argnums=0)
def _fill(config, params, window, start, draw):
    """Replaces tokens start.. of the window, (T,) int32, from left to right."""

    def fill_one(position, window):
        logits = apply(config, params, window[None])[0, position - 1]
        if draw is None:
            token = jnp.argmax(logits)
        else:
            temperature, top_p, key = draw
            drawn_with = jax.random.fold_in(key, position)
            token = jax.random.categorical(
                drawn_with, _likeliest(logits / temperature, top_p)
            )
        return window.at[position].set(token.astype(window.dtype))

    return jax.lax.fori_loop(start, window.size, fill_one, jnp.asarray(window))


def _likeliest(logits, top_p):
    """Returns the logits, minus infinity where likelier tokens reach ``top_p``."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits[order])
    before = jnp.cumsum(probabilities) - probabilities
    return (
        jnp.full_like(logits, -jnp.inf)
        .at[order]
        .set(jnp.where(before < top_p, logits[order], -jnp.inf))
    )
