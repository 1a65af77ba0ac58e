"""Compares the adapters of a tuned encoder with the model that they come from.

The run has to have written its weights::

    python -m experiments.finetune --task mrpc --train ... --validation ... \
        --optimizer galore --save-weights --out runs/mrpc
    python -m benchmarks.tuning.adapters runs/mrpc --out adapters.json

Each adapter has the tuned head and pooler. Embeddings, norms and biases are those of
the pre-trained model, as ``left_out`` says.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.model.adapters import merged
from experiments.model.encoder_files import load_encoder
from experiments.model.extraction import extract
from experiments.run.files import CONFIG_FILE
from experiments.tuning.assemble import assemble
from experiments.tuning.config import TUNING
from experiments.tuning.encoder_work import EncoderWork
from experiments.tuning.results import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.adapters")
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 8, 32])
    parser.add_argument("--energies", nargs="*", type=float, default=[0.9, 0.99])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON")
    options = parser.parse_args()
    flags = ["--config", str(options.run / CONFIG_FILE)]
    config = TUNING.parse([*flags, "--out", str(Path(tempfile.mkdtemp()) / "run")])
    parts = assemble(config, print)
    work = parts.work
    if not isinstance(work, EncoderWork):
        raise SystemExit(f"error: {options.run} has tuned no encoder")
    evaluate = jax.jit(work.evaluate)

    def metrics(params: Any) -> dict[str, Any]:
        found = work.validate(params, lambda batch: evaluate(params, batch))
        return {"loss": found["validation_loss"], **found["validation_metrics"]}

    pretrained = parts.initial_params()
    labels = work.model.num_labels
    path = options.run / WEIGHTS
    tuned = load_encoder(path, labels, jax.random.key(0))[1]
    rows = {"tuned": metrics(tuned), "pre-trained": metrics(pretrained)}
    kept = {f"rank {rank}": {"rank": rank} for rank in options.ranks}
    kept |= {f"energy {share:g}": {"energy": share} for share in options.energies}
    for name, how in kept.items():
        extracted = extract(tuned, pretrained, **how)
        errors = np.concatenate([np.ravel(x) for x in extracted.errors.values()])
        ranks = np.concatenate([np.ravel(x) for x in extracted.ranks.values()])
        rows[name] = {
            **metrics(merged(extracted.params)),
            "adapter_bytes": extracted.adapter_bytes,
            "weight_bytes": extracted.weight_bytes,
            "mean_rank": statistics.mean(ranks.tolist()),
            "mean_error": statistics.mean(errors.tolist()),
            "left_out": list(extracted.left_out),
        }
        print(name, rows[name], flush=True)
    settings = dataclasses.asdict(config)
    names = ("task", "optimizer", "rank", "steps", "learning_rate", "block_scale")
    found = {
        "run": {name: settings[name] for name in names},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
