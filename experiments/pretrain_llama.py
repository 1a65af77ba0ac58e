"""The command: ``python -m experiments.pretrain_llama --help``."""

import functools
import logging
import shlex
import signal
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

from experiments.errors import UserError
from experiments.model.adapters import merged
from experiments.model.hugging_face import save_llama
from experiments.run.assemble import Parts, assemble
from experiments.run.config import PROGRAM, parse
from experiments.run.failures import told_in_a_line
from experiments.run.figures import draw_figures
from experiments.run.files import SUMMARY_FILE, write_json
from experiments.run.lock import Lock
from experiments.run.metrics import read_metrics
from experiments.run.summary import print_summary, sample_text, summarize
from experiments.run.train import Trained, train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done, or stopped by SIGTERM and saved; 2: a mistake of the user's, told in one
    line on stderr; 130: stopped by SIGINT.
    """
    # What Orbax logs, in pages of traceback, an error line says too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    console = Console()
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        say = functools.partial(console.print, soft_wrap=True, highlight=False)
        parts = assemble(config, say)
        say(parts.data.description)
        with told_in_a_line(parts), Lock(parts.directory) as lock:
            trained = train(parts, lock, console)
            lock.check()
            if trained.stopped_by is not None:
                return _say_how_to_resume(parts, trained, console)
            finish(parts, trained, console)
            lock.check()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def finish(parts: Parts, trained: Trained, console: Console) -> dict[str, Any]:
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
        params, tokenizer = merged(trained.params), parts.tokenizer
        # Those of a run that has been extended since are replaced.
        save_llama(directory / "weights", parts.model, params, tokenizer, replace=True)
    console.print(f"results in {directory}", soft_wrap=True, highlight=False)
    print_summary(console, summary)
    if parts.config.sample_tokens:
        prompt, text = sample_text(parts, trained.params)
        console.print("a sample; the text up to | is the prompt:", highlight=False)
        console.print(f"{prompt}|{text}", markup=False, highlight=False, soft_wrap=True)
    return summary


def _say_how_to_resume(parts, trained, console):
    # Its config.json says the rest.
    words = [*_command(), "--out", str(parts.directory), "--resume"]
    console.print(
        f"stopped by {trained.stopped_by.name} and saved at step "
        f"{trained.progress.step}; continue with\n  {shlex.join(words)}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if trained.stopped_by == signal.SIGTERM else 128 + signal.SIGINT


def _command() -> list[str]:
    """Returns the words that start this command, as they would be typed here."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return [str(python), *(["-m", PROGRAM] if __package__ else [sys.argv[0]])]


if __name__ == "__main__":
    sys.exit(main())
