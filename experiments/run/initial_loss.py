"""What the first validation says of weights that were loaded."""

import math

from experiments.run.config import Config


def worse_than_guessing(config: Config, vocab_size: int, loss: float) -> str | None:
    """Returns a warning where loaded weights predict worse than no weights at all.

    Args:
        config: With its tokenizer named.
        vocab_size: Tokens of the model, V.
        loss: The first validation's, in nats per token; guessing has ln V.

    Returns:
        One line; None: the weights are random ones, or predict better than a guess.
    """
    guess = math.log(vocab_size)
    # Not `loss > guess`: a loss that is not a number is no better.
    if config.initial_weights is None or loss <= guess:
        return None
    return (
        f"warning: the weights in {config.initial_weights} start at {loss:.1f} nats "
        f"per token, guessing among their {vocab_size:,} tokens at {guess:.1f}: "
        f"--tokenizer {config.tokenizer} is not the one they were trained with, or "
        "they are not trained; give --tokenizer PATH of their own"
    )
