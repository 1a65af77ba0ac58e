"""What a finished run says of itself: summary.json, a table and a sample of text."""

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.model.adapters import merged
from experiments.model.generate import generate
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
from experiments.run.train import Trained

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "lowrank_optax")


def summarize(
    parts: Parts, trained: Trained, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what summary.json holds; :mod:`experiments.run.quantities` explains it.

    Args:
        parts: Of the run.
        trained: Its end.
        records: The lines of metrics.jsonl.
    """
    config, progress = parts.config, trained.progress
    measures, memory = Measures(parts), memory_use()
    params = trained.params
    model = jax.eval_shape(merged, params)
    device = jax.devices()[0]
    return {
        "optimizer": config.optimizer,
        "model": config.model_name,
        "steps": progress.step,
        **measures.position(progress),
        "parameter_count": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "initial_validation_loss": progress.initial["validation_loss"],
        **progress.validation,
        "bytes_per_token": parts.work.data.bytes_per_token,
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
        "optimizer_state_bytes": optimizer_state_bytes(trained.opt_state),
        "adamw_state_bytes": adamw_state_bytes(model),
        "block_state_bytes": optimizer_state_bytes(block_state(trained.opt_state)),
        "block_adamw_state_bytes": adamw_state_bytes(block_leaves(model)),
        "memory": memory_by_kind(params, trained.opt_state),
        "adamw_memory": adamw_memory_by_kind(model),
        "mean_ranks": mean_ranks(records),
        "rejected_updates": int(optax.tree.get(trained.opt_state, "total_notfinite")),
        "data": parts.work.data.description,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _version(package: str) -> str:
    """Returns the version of a package, which may be imported and not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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


def sample_text(parts: Parts, params: Any) -> tuple[str, str]:
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
    table = Table(show_header=False)
    for name, text in _rows(summary).items():
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


def _rows(summary):
    ours, adamw = summary["optimizer_state_bytes"], summary["adamw_state_bytes"]
    blocks, adamw_blocks = (
        summary["block_state_bytes"],
        summary["block_adamw_state_bytes"],
    )
    rows = {
        "optimizer": summary["optimizer"],
        "model": f"{summary['model']}, {summary['parameter_count']:,} parameters",
        "steps": f"{summary['steps']:,}, {summary['tokens']:,} tokens",
        "validation loss": (
            f"{summary['initial_validation_loss']:.4f} at first, "
            f"{summary['validation_loss']:.4f} at last (nats per token)"
        ),
        "perplexity": _perplexity(summary),
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
    if summary["mean_ranks"]:
        ranks = np.concatenate([np.ravel(r) for r in summary["mean_ranks"].values()])
        rows["mean rank"] = (
            f"{ranks.mean():.1f} ({ranks.min():.1f} to {ranks.max():.1f} by layer)"
        )
    if summary["rejected_updates"]:
        rows["rejected updates"] = f"{summary['rejected_updates']} (not finite)"
    return rows
