"""The work of pre-training: predict each token of a text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from experiments.data.pipeline import Data
from experiments.data.tokenizers import Tokenizer
from experiments.model.adapters import Draw, adapted
from experiments.model.flops import training_flops_per_token
from experiments.model.llama import apply
from experiments.model.shape import LlamaConfig
from experiments.run.config import Config
from experiments.run.initial_loss import worse_than_guessing
from experiments.run.perplexity import bits_per_byte, perplexity
from experiments.run.step import BATCH, mean_loss, summed_token_loss
from experiments.run.work import Batch, Criterion, Evaluate


@dataclasses.dataclass(frozen=True)
class TextWork:
    """A LLaMA and the text that it is trained on; see :class:`~.work.Work`.

    Attributes:
        config: Of the run, completed.
        data: See :mod:`experiments.data.pipeline`.
        model: Shape of the model.
        tokenizer: See :mod:`experiments.data.tokenizers`.
    """

    config: Config
    data: Data
    model: LlamaConfig
    tokenizer: Tokenizer

    @property
    def criterion(self) -> Criterion:
        return Criterion("validation_loss", is_larger_better=False)

    @property
    def description(self) -> str:
        return self.data.description

    @property
    def draw(self) -> Draw:
        return "normal"

    @property
    def digest(self) -> str:
        return self.data.token_digest

    @property
    def data_flag(self) -> str:
        return f"--data {self.config.data}"

    @property
    def first_batches(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        shape = (self.config.batch_size, self.config.sequence_length)
        return [{name: jax.ShapeDtypeStruct(shape, t) for name, t in BATCH.items()}]

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.model, self.config.sequence_length)

    def train_iterator(self) -> Any:
        return self.data.train_iterator()

    def tokens_of(self, batch: Batch) -> int:
        return batch["targets"].size

    def epochs(self, step: int) -> float | None:
        return self.data.epochs(step)

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_token_loss(self._apply, params, batch)

    evaluate = loss

    def validate(self, params: Any, evaluate: Evaluate) -> dict[str, Any]:
        del params
        batches = self.data.validation_batches(self.config.eval_tokens)
        return self.numbers(mean_loss(map(evaluate, batches)))

    def numbers(self, loss: float) -> dict[str, Any]:
        """Returns a validation's loss, in nats per token, and what follows from it."""
        return {
            "validation_loss": loss,
            "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte(loss, self.data.bytes_per_token),
        }

    def told(self, numbers: Mapping[str, Any]) -> str:
        text = f"perplexity {numbers['validation_perplexity']:,.2f}"
        if numbers["validation_bits_per_byte"] is not None:
            text += f", {numbers['validation_bits_per_byte']:.3f} bits per byte"
        return text

    def warning(self, numbers: Mapping[str, Any]) -> str | None:
        loss = numbers["validation_loss"]
        return worse_than_guessing(self.config, self.model.vocab_size, loss)

    def _apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        return apply(self.model, adapted(params), tokens)
