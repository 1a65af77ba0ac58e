"""The numbers of a step and of a validation, as metrics.jsonl has them."""

import math
from typing import Any

import jax
import numpy as np

from experiments.model.flops import training_flops_per_token
from experiments.run.assemble import Parts
from experiments.run.columns import ranks_by_name
from experiments.run.memory import optimizer_state_bytes
from experiments.run.memory_use import memory_use
from experiments.run.peaks import peak_flops


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per token."""
    # Beyond a float's range it says no more than the loss.
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float | None:
    """Returns a loss in nats per token as bits per byte; None: text without bytes."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


class Measures:
    """What a run's numbers come to; :mod:`experiments.run.quantities` explains each.

    Args:
        parts: Of the run.

    Attributes:
        flops_per_token: Of a training step.
        peak_flops: Of all devices, per second; None: not known.
    """

    def __init__(self, parts: Parts):
        config, devices = parts.config, parts.mesh.devices.ravel()
        self._parts = parts
        self._step_tokens = config.batch_size * config.sequence_length
        self.flops_per_token = training_flops_per_token(
            parts.model, config.sequence_length
        )
        peak = peak_flops(devices[0].device_kind, config.compute_dtype)
        self.peak_flops = None if peak is None else peak * len(devices)

    def position(self, step: int) -> dict[str, Any]:
        """Returns how far a run has come after so many steps."""
        return {
            "tokens": step * self._step_tokens,
            "epoch": self._parts.data.epochs(step),
        }

    def speed(self, steps: int, seconds: float) -> dict[str, Any]:
        """Returns the speed of so many steps, at least one, in so many seconds."""
        tokens_per_second = steps * self._step_tokens / seconds
        flops = tokens_per_second * self.flops_per_token
        return {
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds / steps,
            "mfu": None if self.peak_flops is None else flops / self.peak_flops,
        }

    def validation(self, loss: float) -> dict[str, Any]:
        """Returns a validation's loss, in nats per token, and what follows from it."""
        ratio = self._parts.data.bytes_per_token
        return {
            "validation_loss": loss,
            "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte(loss, ratio),
        }

    def step(
        self, step: int, metrics: dict[str, jax.Array], opt_state: Any
    ) -> dict[str, Any]:
        """Returns the numbers of a step that is done.

        Args:
            step: Updates done, this one included.
            metrics: What the step returned, see
                :func:`experiments.run.step.make_train_step`.
            opt_state: Behind it.
        """
        rate = np.asarray(self._parts.schedule(step - 1)).item()
        memory = memory_use()
        record = {
            "loss": float(metrics["loss"]),
            "learning_rate": rate,
            "block_learning_rate": rate * (self._parts.config.block_scale or 1.0),
            "grad_norm": float(metrics["grad_norm"]),
            "memory_in_use_bytes": memory.in_use,
            "peak_memory_bytes": memory.peak,
            "optimizer_state_bytes": optimizer_state_bytes(opt_state),
            "rejected_updates": int(metrics["rejected"]),
        }
        ranks = ranks_by_name(opt_state)
        return {**record, "ranks": ranks} if ranks else record
