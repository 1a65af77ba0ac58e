"""What a finished run says of itself: summary.json, a table and a sample of text."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.distribution.agreement import versions
from experiments.distribution.processes import count
from experiments.model.adapters import merged
from experiments.model.generate import generate
from experiments.run.effective_rank import effective_ranks
from experiments.run.measures import Measures
from experiments.run.memory import (
    adamw_memory_by_kind,
    adamw_state_bytes,
    block_leaves,
    block_state,
    memory_by_kind,
    optimizer_state_bytes,
)
from experiments.run.memory_use import memory_use
from experiments.run.parts import Parts
from experiments.run.printable import continuation, printable
from experiments.run.text import TextWork
from experiments.run.train import Trained

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "lowrank_optax")


def summarize(
    parts: Parts[TextWork], trained: Trained, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what summary.json holds; :mod:`experiments.run.quantities` explains it.

    Args:
        parts: Of the run.
        trained: Its end.
        records: The lines of metrics.jsonl.
    """
    progress = trained.progress
    return {
        **identity(parts, trained),
        "initial_validation_loss": progress.initial["validation_loss"],
        **progress.validation,
        "bytes_per_token": parts.work.data.bytes_per_token,
        **costs(parts, trained, records),
    }


def identity(parts: Parts, trained: Trained) -> dict[str, Any]:
    """Returns what was trained, with what, and for how long."""
    model = jax.eval_shape(merged, trained.params)
    return {
        "optimizer": parts.config.optimizer,
        "model": parts.config.model_name,
        "steps": trained.progress.step,
        **Measures(parts).position(trained.progress),
        "parameter_count": sum(leaf.size for leaf in jax.tree.leaves(model)),
    }


def costs(
    parts: Parts, trained: Trained, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns time, bytes and ranks of a run, and where it ran."""
    progress, measures, memory = trained.progress, Measures(parts), memory_use()
    params, opt_state = trained.params, trained.opt_state
    model = jax.eval_shape(merged, params)
    device = jax.devices()[0]
    return {
        **measures.speed(progress.tokens, progress.step, progress.seconds),
        "flops_per_token": measures.flops_per_token,
        "peak_flops_per_second": measures.peak_flops,
        "training_seconds": progress.seconds,
        "compile_seconds": trained.compile_seconds,
        "compilations": trained.compilations,
        "compactions": progress.compaction.done,
        "best": progress.best,
        "changes": progress.changes,
        "peak_memory_bytes": _peak(records, memory.peak),
        "memory_source": memory.source,
        "step_peak_bytes": trained.step_peak_bytes,
        "optimizer_state_bytes": optimizer_state_bytes(opt_state),
        "adamw_state_bytes": adamw_state_bytes(model),
        "block_state_bytes": optimizer_state_bytes(block_state(opt_state)),
        "block_adamw_state_bytes": adamw_state_bytes(block_leaves(model)),
        "memory": memory_by_kind(params, opt_state),
        "adamw_memory": adamw_memory_by_kind(model),
        "bytes_per_device": trained.bytes_per_device,
        "mean_ranks": mean_ranks(records),
        **effective_ranks(
            progress.rank_sums, opt_state, params, getattr(parts.config, "rank", None)
        ),
        "rejected_updates": int(optax.tree.get(opt_state, "total_notfinite")),
        "data": parts.work.description,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "mesh": trained.mesh,
        "processes": count(),
        "versions": versions(_PACKAGES),
    }


def _peak(records, now):
    """Returns the highest peak of all processes of the run."""
    found = [record.get("peak_memory_bytes") for record in records]
    return max(filter(None, [*found, now]), default=None)


def mean_ranks(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns each leaf's rank, averaged over the lines: a number or one per layer."""
    lines = [record["ranks"] for record in records if "ranks" in record]
    if not lines:
        return {}
    return {
        name: np.mean([line[name] for line in lines], axis=0).tolist()
        for name in lines[0]
    }


def sample_text(parts: Parts[TextWork], params: Any) -> tuple[str, str]:
    """Returns the beginning of the validation text, and how the model goes on from it.

    The prompt is a quarter of a sequence; ``--sample-tokens`` follow it.
    """
    config, tokenizer = parts.config, parts.work.tokenizer
    window = next(parts.work.data.validation_batches(1))["inputs"][0]
    prompt = window[: max(1, config.sequence_length // 4)]
    tokens = generate(
        parts.work.model,
        jax.device_put(merged(params), jax.devices()[0]),
        prompt,
        config.sample_tokens,
        temperature=config.sample_temperature,
        key=jax.random.key(config.seed),
    )
    text = continuation(tokenizer, tokens, len(prompt))
    return printable(tokenizer.decode(prompt)), text


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Prints the short table of a run."""
    print_rows(
        console,
        {
            "optimizer": summary["optimizer"],
            "model": f"{summary['model']}, {summary['parameter_count']:,} parameters",
            "steps": f"{summary['steps']:,}, {summary['tokens']:,} tokens",
            "validation loss": (
                f"{summary['initial_validation_loss']:.4f} at first, "
                f"{summary['validation_loss']:.4f} at last (nats per token)"
            ),
            "perplexity": _perplexity(summary),
            **cost_rows(summary),
        },
    )


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Prints a table of names and texts."""
    table = Table(show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _perplexity(summary):
    text = f"{summary['validation_perplexity']:,.2f}"
    if summary["validation_bits_per_byte"] is None:
        return text
    return f"{text}, {summary['validation_bits_per_byte']:.3f} bits per byte"


def _step_time(summary):
    text = f"{1e3 * summary['step_seconds']:,.1f} ms"
    return text if summary["mfu"] is None else f"{text}, MFU {summary['mfu']:.1%}"


def _peak_memory(summary):
    if summary["peak_memory_bytes"] is None:
        return "the device does not say"
    of = {"device": "of the device", "process": "of the whole process"}
    return (
        f"{summary['peak_memory_bytes'] / 1e9:.2f} GB, {of[summary['memory_source']]}"
    )


def _on_each_device(summary):
    found = summary["bytes_per_device"]
    sizes = ", ".join(f"{name} {size}" for name, size in summary["mesh"].items())
    on_host = found["optimizer_state_in_host_memory"]
    beside = f", {on_host:,} more in the host's memory" if on_host else ""
    return (
        f"{found['parameters']:,} bytes of parameters, {found['optimizer_state']:,} "
        f"of optimizer state{beside} (mesh: {sizes})"
    )


def cost_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rows of the table on time, bytes and ranks."""
    ours, adamw = summary["optimizer_state_bytes"], summary["adamw_state_bytes"]
    blocks, adamw_blocks = (
        summary["block_state_bytes"],
        summary["block_adamw_state_bytes"],
    )
    rows = {
        "tokens per second": (
            f"{summary['tokens_per_second']:,.0f} "
            f"({summary['training_seconds']:.1f} s of training; "
            f"compilation {summary['compile_seconds']:.1f} s, "
            f"{summary['compilations']} x the step)"
        ),
        "time per step": _step_time(summary),
        "peak memory": _peak_memory(summary),
        "optimizer state": f"{ours:,} bytes, {ours / adamw:.2f} of AdamW's {adamw:,}",
        "of block matrices": (
            f"{blocks:,} bytes, {blocks / adamw_blocks:.2f} of AdamW's {adamw_blocks:,}"
        ),
    }
    on_host = summary["bytes_per_device"]["optimizer_state_in_host_memory"]
    if math.prod(summary["mesh"].values()) > 1 or on_host:
        rows["on each device"] = _on_each_device(summary)
    if summary["mean_ranks"]:
        ranks = np.concatenate([np.ravel(r) for r in summary["mean_ranks"].values()])
        rows["mean rank"] = (
            f"{ranks.mean():.1f} ({ranks.min():.1f} to {ranks.max():.1f} by layer)"
        )
    if summary["rejected_updates"]:
        rows["rejected updates"] = f"{summary['rejected_updates']} (not finite)"
    return rows
