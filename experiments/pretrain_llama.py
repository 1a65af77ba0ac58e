"""The command: ``python -m experiments.pretrain_llama --help``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script, its own folder comes first, not the one that `experiments` is in.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    # Before the imports below, which take seconds.
    from experiments.run.interrupts import leave_at_interrupt

    leave_at_interrupt()

from rich.console import Console

from experiments.model.adapters import merged
from experiments.model.hugging_face import save_llama
from experiments.run.assemble import assemble
from experiments.run.command import run_training, status_of, train_and_finish
from experiments.run.config import parse
from experiments.run.figures import draw_figures
from experiments.run.files import SUMMARY_FILE, write_json
from experiments.run.flags import Config
from experiments.run.metrics import read_metrics
from experiments.run.parts import Parts
from experiments.run.summary import print_summary, sample_text, summarize
from experiments.run.text import TextWork
from experiments.run.train import Trained


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done, or stopped by SIGTERM and saved; 2: a mistake of the user's, told in one
    line on stderr; 130: stopped by SIGINT.
    """
    return run_training(sys.argv[1:] if argv is None else argv, parse, _run)


def _run(config: Config, console: Console) -> int:
    return status_of(train_and_finish(config, assemble, finish, console))


def finish(
    parts: Parts[TextWork], trained: Trained, console: Console
) -> dict[str, Any]:
    """Writes summary, figures and weights of a finished run, and prints its end.

    Returns:
        What summary.json holds.
    """
    directory = parts.directory
    records = read_metrics(directory)
    summary = summarize(parts, trained, records)
    write_json(directory / SUMMARY_FILE, summary)
    draw_figures(directory / "figures", records, summary)
    if parts.config.save_weights:
        params, work = merged(trained.params), parts.work
        # Those of a run that has been extended since are replaced.
        save_llama(
            directory / "weights", work.model, params, work.tokenizer, replace=True
        )
    console.print(f"results in {directory}", soft_wrap=True, highlight=False)
    print_summary(console, summary)
    if parts.config.sample_tokens:
        prompt, text = sample_text(parts, trained.params)
        console.print("a sample; the text up to | is the prompt:", highlight=False)
        console.print(f"{prompt}|{text}", markup=False, highlight=False, soft_wrap=True)
    return summary


if __name__ == "__main__":
    sys.exit(main())
