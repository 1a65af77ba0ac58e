"""The command: ``python -m experiments.finetune --help``."""

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

from experiments.run.command import run_training, status_of, train_and_finish
from experiments.run.figures import draw_figures
from experiments.run.files import SUMMARY_FILE, write_json
from experiments.run.metrics import read_metrics
from experiments.run.parts import Parts
from experiments.run.rank_figures import draw_rank_figures
from experiments.run.train import Trained
from experiments.tuning import seeds
from experiments.tuning.assemble import assemble
from experiments.tuning.config import TUNING
from experiments.tuning.flags import TuningConfig
from experiments.tuning.results import save_models
from experiments.tuning.spectra import read_spectra, write_spectra
from experiments.tuning.summary import print_summary, summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done, or stopped by SIGTERM and saved; 2: a mistake of the user's, told in one
    line on stderr; 130: stopped by SIGINT.
    """
    return run_training(sys.argv[1:] if argv is None else argv, TUNING.parse, _run)


def _run(config: TuningConfig, console: Console) -> int:
    if config.seeds == 1:
        return status_of(train_and_finish(config, assemble, finish, console))
    parent, configs = seeds.begin(config)
    for one in configs:
        # What is done stays; what was stopped is gone on with.
        if config.resume and seeds.is_finished(one):
            continue
        console.print(f"seed {one.seed}", highlight=False)
        stopped = train_and_finish(one, assemble, finish, console, whole=parent)
        if stopped is not None:
            return status_of(stopped)
        seeds.wait_for_results(one)
    seeds.report(configs, console)
    return 0


def finish(parts: Parts[Any], trained: Trained, console: Console) -> dict[str, Any]:
    """Writes summary, figures, weights and adapter of a run, and prints its end.

    Returns:
        What summary.json holds.
    """
    directory, config = parts.directory, parts.config
    records = read_metrics(directory)
    saved = save_models(parts, trained)
    summary = {**summarize(parts, trained, records), "adapter": saved.adapter}
    left_out = write_spectra(parts)
    write_json(directory / SUMMARY_FILE, summary)
    figures = directory / "figures"
    draw_figures(figures, records, summary)
    spectra = read_spectra(directory)
    draw_rank_figures(figures, records, summary, spectra, config.threshold)
    console.print(f"results in {directory}", soft_wrap=True, highlight=False)
    print_summary(console, summary)
    for line in [*saved.lines, *([left_out] if left_out else [])]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return summary


if __name__ == "__main__":
    sys.exit(main())
