"""Shape and numerics of a LLaMA, and named shapes."""

import dataclasses
from typing import Any

from experiments.errors import UserError

# Hidden size, intermediate size, layers, heads. From 60m up: GaLore's comparison.
_SIZES = {
    "tiny": (128, 344, 4, 4),
    "5m": (256, 688, 6, 8),
    "9m": (128, 352, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_layers", "num_heads")

# Everything but the vocabulary.
MODELS: dict[str, dict[str, int]] = {
    name: {**dict(zip(_SIZE_FIELDS, size, strict=True)), "num_kv_heads": size[-1]}
    for name, size in _SIZES.items()
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a LLaMA.

    Attributes:
        vocab_size: Tokens V, >= 1.
        hidden_size: Width d, a multiple of ``num_heads`` with d / num_heads even.
        intermediate_size: Width f of the gated feed-forward layer, >= 1.
        num_layers: Transformer blocks L, >= 1.
        num_heads: Query heads H, >= 1.
        num_kv_heads: Key and value heads, a divisor of ``num_heads``.
        rms_norm_eps: Added to the mean square inside RMSNorm, > 0.
        rope_theta: Base of the rotary wavelengths, in positions, > 0.
        tie_embeddings: Whether the head is the transposed embedding.
        max_positions: Tokens of the longest sequence in training, >= 1. The number is
            an entry of Hugging Face's files; the model does not use it.
        remat: Whether the backward pass recomputes each block from its input. If not,
            it keeps the products of the kernels and recomputes the rest.
        compute_dtype: dtype of activations and products, "float32" or "bfloat16";
            norms, softmax and logits are always float32.
        param_dtype: dtype in which parameters are stored, "float32" or "bfloat16".

    Raises:
        UserError: If a value is out of its range.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    max_positions: int = 2048
    remat: bool = False
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
            *("num_heads", "num_kv_heads", "rms_norm_eps", "rope_theta"),
            "max_positions",
        ):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"model: {name} is {getattr(self, name)}; give a number above 0"
                )
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"model: hidden_size {self.hidden_size} does not split into "
                f"{self.num_heads} heads of even width; change hidden_size or num_heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model: num_kv_heads {self.num_kv_heads} does not divide num_heads "
                f"{self.num_heads}; give one of its divisors"
            )
        check_dtypes(self)

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.hidden_size // self.num_heads


def check_dtypes(config: Any) -> None:
    """Raises UserError if a dtype of a model's configuration is not one of ours."""
    for name in ("compute_dtype", "param_dtype"):
        if getattr(config, name) not in ("float32", "bfloat16"):
            raise UserError(
                f"model: {name} is {getattr(config, name)!r}; "
                "choose one of float32, bfloat16"
            )


def preset(name: str, vocab_size: int, **overrides: Any) -> LlamaConfig:
    """Returns the configuration of a model of :data:`MODELS`.

    Args:
        name: A key of :data:`MODELS`.
        vocab_size: Tokens of the tokenizer, its end of document included.
        **overrides: Fields of :class:`LlamaConfig` that replace the preset's.

    Returns:
        The configuration.

    Raises:
        UserError: If the name is unknown, or a value is out of range.

    Example:
        >>> preset("tiny", 257).num_layers
        4
    """
    if name not in MODELS:
        raise UserError(
            f"model: unknown name {name!r}; choose one of {', '.join(MODELS)}"
        )
    return LlamaConfig(**{"vocab_size": vocab_size, **MODELS[name], **overrides})
