"""The work of tuning an encoder: predict the label of each example."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.model.adapters import adapted
from experiments.model.encoder import apply_encoder
from experiments.model.encoder_files import load_encoder
from experiments.model.encoder_shape import EncoderConfig
from experiments.run.step import mean_loss
from experiments.run.work import Batch, Evaluate
from experiments.tasks.metrics import score
from experiments.tuning.frozen import without_frozen
from experiments.tuning.numbers import numbers
from experiments.tuning.work import TuningWork


@dataclasses.dataclass(frozen=True)
class EncoderWork(TuningWork):
    """An encoder and its examples; see :class:`experiments.run.work.Work`.

    The loss of a class is its cross entropy in nats, that of a number the squared
    error.

    Attributes:
        model: Shape of the model.
        path: Directory of the pre-trained weights.
    """

    model: EncoderConfig
    path: Path

    def pretrained(self) -> Any:
        """Returns the parameters on disk, with a new head where theirs does not fit."""
        key = jax.random.key(self.config.seed)
        return load_encoder(self.path, self.model.num_labels, key)[1]

    def tokens_of(self, batch: Batch) -> int:
        return int((batch["mask"].sum(axis=1) * batch["weights"]).sum())

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # The key follows the examples: a resumed run drops what it would have dropped.
        key = jax.random.fold_in(jax.random.key(self.config.seed), batch["draw"][0])
        params = without_frozen(self.config, params)
        return self._summed(self._logits(params, batch, key), batch)

    def evaluate(self, params: Any, batch: Batch) -> dict[str, Any]:
        logits = self._logits(params, batch, None)
        return {"loss": self._summed(logits, batch), "logits": logits}

    def validate(self, params: Any, evaluate: Evaluate) -> dict[str, Any]:
        del params
        losses, metrics = [], {}
        for split in self.data.splits:
            labels = self.data.labels(split)
            predictions = np.zeros_like(labels)
            for batch in self.data.batches(split):
                found = evaluate(batch)
                if split == self.data.splits[0]:
                    losses.append(found["loss"])
                places, kept = batch["index"], batch["index"] >= 0
                predictions[places[kept]] = self._predicted(found["logits"])[kept]
            metrics[split] = score(self.task.metrics, predictions, labels)
        return numbers(mean_loss(losses), metrics)

    def _logits(self, params, batch, key):
        return apply_encoder(
            self.model,
            adapted(params),
            batch["tokens"],
            batch["mask"],
            batch["segments"],
            key,
        )

    def _summed(self, logits, batch):
        labels, weights = batch["labels"], batch["weights"]
        if self.task.kind == "number":
            losses = (logits[:, 0] - labels) ** 2
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(weights * losses), jnp.sum(weights)

    def _predicted(self, logits):
        logits = np.asarray(logits)
        return logits[:, 0] if self.task.kind == "number" else logits.argmax(axis=1)
