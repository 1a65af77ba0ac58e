"""A loss in nats per token as perplexity and bits per byte."""

import math


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per token."""
    # Beyond a float's range it says no more than the loss.
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float | None:
    """Returns a loss in nats per token as bits per byte; None: text without bytes."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
