"""The models that a fine-tuning run leaves behind: weights, and an adapter."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.distribution.placement import replicate, shard_batch
from experiments.model.adapters import merged
from experiments.model.encoder_files import save_encoder
from experiments.model.extraction import extract
from experiments.model.hugging_face import save_llama
from experiments.model.peft import save_peft_adapter
from experiments.model.pretrained import find_model
from experiments.optim.methods import OPTIMIZERS
from experiments.run.parts import Parts
from experiments.run.step import make_eval_step
from experiments.run.train import Trained
from experiments.tuning.encoder_work import EncoderWork
from experiments.tuning.numbers import in_words
from experiments.tuning.start import pretrained

WEIGHTS, ADAPTER = "weights", "adapter"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was written beside the figures.

    Attributes:
        adapter: Entry of summary.json; None: no adapter was extracted.
        lines: To be printed.
    """

    adapter: dict[str, Any] | None
    lines: list[str]


def save_models(parts: Parts[Any], trained: Trained) -> Saved:
    """Writes weights/ and adapter/, as far as the flags ask for them.

    What an earlier, shorter run has left there is replaced.

    Args:
        parts: Of the run.
        trained: Its end.

    Raises:
        UserError: If the rank of the adapter does not fit a matrix.
    """
    config, directory = parts.config, parts.directory
    if config.save_weights:
        _save_weights(parts, directory / WEIGHTS, merged(trained.params))
    if OPTIMIZERS[config.optimizer].adapters == "lora":
        _save_adapter(parts, trained.params)
        return Saved(None, [f"adapter in {directory / ADAPTER}"])
    if config.save_adapter is None:
        return Saved(None, [])
    is_rank = config.save_adapter >= 1
    extracted = extract(
        merged(trained.params),
        pretrained(parts.work),
        rank=int(config.save_adapter) if is_rank else None,
        energy=None if is_rank else config.save_adapter,
    )
    _save_adapter(parts, extracted.params)
    numbers = _validated(parts, merged(extracted.params))
    metrics = numbers["validation_metrics"]
    lines = [
        str(extracted),
        f"with the adapter alone: {in_words(metrics)}; adapter in "
        f"{directory / ADAPTER}",
    ]
    found = {**extracted.to_dict(), "metrics": metrics}
    return Saved(found, lines)


def _save_weights(parts: Parts[Any], directory: Path, params: Any) -> None:
    work = parts.work
    if isinstance(work, EncoderWork):
        names = work.data.label_names or None
        save_encoder(directory, work.model, params, work.path, names, replace=True)
    else:
        save_llama(directory, work.model, params, work.tokenizer, replace=True)


def _save_adapter(parts: Parts[Any], params: Any) -> None:
    base = str(find_model(parts.config.model))
    directory = parts.directory / ADAPTER
    save_peft_adapter(directory, params, parts.work.model, base, replace=True)


def _validated(parts: Parts[Any], params: Any) -> dict[str, Any]:
    """Returns the numbers of a validation of other parameters."""
    params = replicate(params, parts.mesh)
    step = make_eval_step(parts.work.evaluate, parts.mesh)

    def evaluate(batch):
        return step(params, shard_batch(batch, parts.mesh))

    return parts.work.validate(params, evaluate)
