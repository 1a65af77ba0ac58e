"""The floating-point operations that training a LLaMA takes."""

from experiments.model.shape import LlamaConfig


def training_flops_per_token(model: LlamaConfig, sequence_length: int) -> int:
    """Returns the operations per token of a training step: 6 N + 12 L d T.

    N counts the numbers in kernels and head (the embedding is looked up, not
    multiplied). A product costs 2 operations per number forward and 4 backward. The
    second term is attention's scores and their sums over values; both count all T
    positions, also those that a causal mask hides.

    These are the model's operations, the same for every optimizer: what ``remat``
    computes again, what subspace gradients save and what the optimizer itself does are
    not in them.

    Args:
        model: Its shape.
        sequence_length: Tokens T of a sequence, >= 1.

    References:
        Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, appendix B.
    """
    hidden, layers = model.hidden_size, model.num_layers
    attention = 2 * hidden * (hidden + model.num_kv_heads * model.head_dim)
    mlp = 3 * hidden * model.intermediate_size
    numbers = layers * (attention + mlp) + hidden * model.vocab_size
    return 6 * numbers + 12 * layers * hidden * sequence_length
