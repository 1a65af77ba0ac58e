"""Continuing sequences of tokens with a trained model."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from experiments.model.decode import decode
from experiments.model.llama import Params
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

    Programs are compiled for P and for ``length`` rounded up to powers of two, at least
    16. The result is a function of the arguments alone.

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
    _check_prompt(config, prompt_tokens)
    if length < 1 or temperature < 0:
        raise UserError(
            f"generate: length is {length} and temperature {temperature}; "
            "give a length of at least 1 and a temperature of at least 0"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"generate: top_p is {top_p}; give one above 0 and at most 1")
    if temperature > 0 and key is None:
        raise UserError("generate: a temperature above 0 draws tokens; give a key")
    draw = None if temperature == 0 else (temperature, top_p, key)
    (new,) = _continued(config, params, [prompt_tokens], length, (), draw)
    return np.concatenate([np.asarray(prompt_tokens, np.int32), new])


def generate_batch(
    config: LlamaConfig,
    params: Params,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    batch_size: int,
) -> list[np.ndarray]:
    """Continues many prompts with the likeliest tokens, each up to its end.

    Prompts of similar length are decoded together, until all of them have ended. Each
    continuation is that of the prompt alone, but where two tokens are equally likely to
    rounding.

    Args:
        config: The model.
        params: Its parameters.
        prompts: Each at least one token, in [0, V).
        max_new_tokens: New tokens of a prompt at most, >= 1.
        stop_ids: Tokens that end a continuation.
        batch_size: Prompts at a time, >= 1. The cache takes 2 L d K / H numbers for
            each of their tokens.

    Returns:
        The continuation of each prompt, (n_i,) int32, with n_i <= max_new_tokens:
        without the prompt, and without the token that ended it.

    Raises:
        UserError: If a prompt is empty or has an unknown token.
    """
    for prompt in prompts:
        _check_prompt(config, prompt)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # The last batch is filled up, so that it has the shape of the others.
        filled = chosen + chosen[:1] * (batch_size - len(chosen))
        rows = [prompts[i] for i in filled]
        new = _continued(config, params, rows, max_new_tokens, stop_ids, None)
        found |= dict(zip(chosen, new, strict=False))
    return [found[i] for i in range(len(prompts))]


def _check_prompt(config, tokens):
    prompt = np.asarray(tokens, np.int32)
    if prompt.size == 0 or prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise UserError(
            f"generate: the prompt {prompt.tolist()} must hold at least one token, "
            f"each from 0 to {config.vocab_size - 1}"
        )


def _continued(config, params, prompts, limit, stop_ids, draw):
    """Yields the new tokens of each prompt, (n_i,) int32, its end left out."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = _bucket(lengths.max())
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    stops = np.array(stop_ids, np.int32)
    begin, most = width - lengths, _bucket(limit)
    tokens = _decode(config, most, params, padded, begin, np.int32(limit), stops, draw)
    for row in np.asarray(tokens)[:, :limit]:
        ends = np.flatnonzero(np.isin(row, stops))
        yield row[: ends[0]] if ends.size else row


def _bucket(length):
    """Returns the power of two, at least 16, that a program is compiled for."""
    return max(16, 1 << (int(length) - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config, most, params, prompts, begin, limit, stop_ids, draw):
    """Calls :func:`decode` with the likeliest tokens, or with draws."""

    def choose(logits, written):
        if draw is None:
            return jnp.argmax(logits, axis=-1)
        temperature, top_p, key = draw
        # A draw's key is its place in the one sequence.
        drawn_with = jax.random.fold_in(key, prompts.shape[1] - begin[0] + written)
        likeliest = _likeliest(logits[0] / temperature, top_p)
        return jax.random.categorical(drawn_with, likeliest)[None]

    return decode(config, params, prompts, begin, choose, limit, stop_ids, most)


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
