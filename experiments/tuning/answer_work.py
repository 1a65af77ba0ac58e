"""The work of tuning a LLaMA: predict the tokens of each answer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.data.tokenizers import Tokenizer
from experiments.model.adapters import adapted
from experiments.model.hugging_face import load_llama
from experiments.model.layers import together
from experiments.model.llama import apply
from experiments.model.shape import LlamaConfig
from experiments.run.step import mean_loss, summed_token_loss
from experiments.run.work import Batch, Evaluate
from experiments.tasks.answer_metrics import evaluate_answers
from experiments.tasks.answers import Prompts
from experiments.tasks.rows import Rows
from experiments.tuning.frozen import without_frozen
from experiments.tuning.numbers import numbers
from experiments.tuning.work import TuningWork


@dataclasses.dataclass(frozen=True)
class AnswerWork(TuningWork):
    """A LLaMA and its answers; see :class:`experiments.run.work.Work`.

    The loss is the cross entropy of the answers' tokens, in nats.

    Attributes:
        model: Shape of the model.
        path: Directory or ``.gguf`` file of the pre-trained weights.
        tokenizer: Of the model.
        prompts: How the model is asked.
        rows: To answer at each validation, by the name of their split.
        columns: Of the question and of the answer.
    """

    model: LlamaConfig
    path: Path
    tokenizer: Tokenizer
    prompts: Prompts
    rows: Mapping[str, Rows]
    columns: tuple[str, str]

    def pretrained(self) -> Any:
        """Returns the parameters on disk."""
        return load_llama(self.path)[1]

    def tokens_of(self, batch: Batch) -> int:
        return int(batch["weights"].sum())

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.evaluate(without_frozen(self.config, params), batch)

    def evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_token_loss(self._apply, params, batch)

    def validate(self, params: Any, evaluate: Evaluate) -> dict[str, Any]:
        loss = mean_loss(map(evaluate, self.data.batches(self.data.splits[0])))
        question, answer = self.columns
        metrics = {
            split: evaluate_answers(
                self.model,
                together(adapted(params)),
                self.prompts,
                rows,
                text_column=question,
                answer_column=answer,
                max_length=self.config.max_length or self.model.max_positions,
                batch_size=self.config.batch_size,
                max_new_tokens=self.config.answer_tokens,
            )
            for split, rows in self.rows.items()
        }
        return numbers(loss, metrics)

    def _apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        return apply(self.model, adapted(params), tokens)
