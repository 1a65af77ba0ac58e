"""The numbers of a step, as metrics.jsonl has them."""

from typing import Any

import jax
import numpy as np

from experiments.run.columns import ranks_by_name
from experiments.run.memory import optimizer_state_bytes
from experiments.run.memory_use import memory_use
from experiments.run.parts import Parts
from experiments.run.peaks import peak_flops
from experiments.run.progress import Progress


class Measures:
    """What a run's numbers come to; :mod:`experiments.run.quantities` explains each.

    Args:
        parts: Of the run.

    Attributes:
        flops_per_token: Of a training step; None: not counted.
        peak_flops: Of all devices, per second; None: not known.
    """

    def __init__(self, parts: Parts):
        config, devices = parts.config, parts.mesh.devices.ravel()
        self._parts = parts
        self.flops_per_token = parts.work.flops_per_token
        peak = peak_flops(devices[0].device_kind, config.compute_dtype)
        self.peak_flops = None if peak is None else peak * len(devices)

    def position(self, progress: Progress) -> dict[str, Any]:
        """Returns how far a run has come."""
        epoch = self._parts.work.epochs(progress.step)
        return {"tokens": progress.tokens, "epoch": epoch}

    def speed(self, tokens: int, steps: int, seconds: float) -> dict[str, Any]:
        """Returns the speed of so many steps, at least one, in so many seconds."""
        tokens_per_second = tokens / seconds
        mfu = None
        if self.peak_flops is not None and self.flops_per_token is not None:
            mfu = tokens_per_second * self.flops_per_token / self.peak_flops
        return {
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds / steps,
            "mfu": mfu,
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
