"""Shape and numerics of an encoder: BERT or RoBERTa."""

import dataclasses
from typing import Literal

from experiments.errors import UserError
from experiments.model.shape import check_dtypes

_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("max_positions", "type_vocab_size", "layer_norm_eps", "num_labels"),
)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of a BERT or RoBERTa with a head for sequences.

    Attributes:
        kind: "bert" or "roberta". RoBERTa has no segments, counts positions from
            ``padding_id`` + 1, and drops out before its pooler too.
        vocab_size: Tokens V, >= 1.
        hidden_size: Width d, a multiple of ``num_heads``.
        intermediate_size: Width f of the feed-forward layer, >= 1.
        num_layers: Transformer blocks L, >= 1.
        num_heads: Attention heads H, >= 1.
        max_positions: Tokens of the longest sequence, >= 1.
        type_vocab_size: Kinds S of segments, >= 1.
        layer_norm_eps: Added to the variance inside layer norm, > 0.
        padding_id: The token that fills sequences up, in [0, V).
        hidden_dropout: Part of the embeddings' and of every layer's outputs that is
            dropped in training, in [0, 1).
        attention_dropout: Part of the attention probabilities, in [0, 1).
        classifier_dropout: Part of what the head reads, in [0, 1).
        num_labels: Outputs of the head, >= 1; 1 is regression.
        remat: Whether the backward pass recomputes each block from its input. If not,
            it keeps the products of the kernels and recomputes the rest.
        compute_dtype: dtype of activations and products, "float32" or "bfloat16";
            norms, softmax and logits are always float32.
        param_dtype: dtype in which parameters are stored, "float32" or "bfloat16".

    Raises:
        UserError: If a value is out of its range.
    """

    kind: Literal["bert", "roberta"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    padding_id: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    num_labels: int = 2
    remat: bool = False
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in ("bert", "roberta"):
            raise UserError(
                f"model: kind is {self.kind!r}; choose one of bert, roberta"
            )
        for name in _COUNTS:
            if not getattr(self, name) > 0:
                raise UserError(
                    f"model: {name} is {getattr(self, name)}; give a number above 0"
                )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model: hidden_size {self.hidden_size} does not split into "
                f"{self.num_heads} heads; change hidden_size or num_heads"
            )
        if not 0 <= self.padding_id < self.vocab_size:
            raise UserError(
                f"model: padding_id is {self.padding_id}; give a token from 0 to "
                f"{self.vocab_size - 1}"
            )
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"model: {name} is {getattr(self, name)}; "
                    "give a number of at least 0 and below 1"
                )
        check_dtypes(self)

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token of a sequence gets.

        RoBERTa counts tokens from ``padding_id`` + 1. Padding is at the end, so that
        its own rows do not matter.
        """
        return self.padding_id + 1 if self.kind == "roberta" else 0

    @property
    def position_rows(self) -> int:
        """Rows P of the position table: RoBERTa's first ones belong to padding."""
        return self.first_position + self.max_positions
