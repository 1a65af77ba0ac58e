"""How likely a decoder finds given answers."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.model.llama import Params, apply
from experiments.model.shape import LlamaConfig
from experiments.tasks.answer_data import AnswerExamples
from experiments.tasks.answers import Pair
from experiments.tasks.buckets import bucket_lengths, bucket_of, in_order_of_length


class Likelihoods(NamedTuple):
    """Of n answers, given their prompts.

    Attributes:
        sums: Log-likelihood of each, in nats, (n,) float32.
        hits: How many tokens of each are the likeliest ones behind those before; (n,)
            int64. If all are, greedy decoding gives this answer.
    """

    sums: np.ndarray
    hits: np.ndarray


def likelihoods(
    config: LlamaConfig, params: Params, pairs: Sequence[Pair], batch_size: int
) -> Likelihoods:
    """Scores answers, in batches of at most four lengths, each compiled once.

    Args:
        config: The model.
        params: Its parameters.
        pairs: At least one, each with at least one token of both. Prompts that many
            pairs share are read for each of them.
        batch_size: Pairs at a time, >= 1. A batch takes the logits of its tokens, V
            float32 each.
    """
    examples = AnswerExamples(pairs)
    lengths = examples.lengths
    buckets = bucket_lengths(lengths, [lengths], batch_size)
    found = Likelihoods(np.zeros(len(pairs), np.float32), np.zeros(len(pairs), int))
    for places in in_order_of_length(lengths, batch_size):
        index = np.full(batch_size, -1)
        index[: len(places)] = places
        batch = examples.batch(index, bucket_of(int(lengths[places[-1]]), buckets))
        for values, all_values in zip(
            _score(config, params, batch), found, strict=True
        ):
            all_values[places] = np.asarray(values)[: len(places)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _score(config, params, batch):
    """Returns sums and hits of a batch, (B,)."""
    logits = apply(config, params, batch["inputs"])
    targets, weights = batch["targets"], batch["weights"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets) * weights
    return -(losses * weights).sum(axis=1), hits.sum(axis=1)
