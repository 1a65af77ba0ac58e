"""What the terminal shows during training: a bar, or plain lines where it is a file."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Loss, speed, memory and time left, as a context manager.

    Args:
        console: Where to show it.
        steps: Length of the run.
        step: Steps done before.
    """

    def __init__(self, console: Console, steps: int, step: int = 0):
        self._console = console
        self._steps = steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, text="")
        self._first_step, self._started = step, None
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Shows that a step has been started."""
        if self._started is None:
            self._first_step, self._started = step, time.monotonic()
        self._bar.update(self._task, completed=step)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows the numbers of a logged step.

        Args:
            record: Its line of metrics.jsonl.
        """
        step, now = record["step"], time.monotonic()
        text = "  ".join(self._parts(record, now))
        self._bar.update(self._task, text=text)
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps
        if is_due and not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {text}")
            self._last_line = now

    def validated(self, step: int, loss: float, text: str) -> None:
        """Prints a validation.

        Args:
            step: Steps done.
            loss: The validation's.
            text: Its other numbers in words.
        """
        when = f"at step {step}" if step else "at first"
        self.say(f"validation loss {loss:.4f} {when} ({text})")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, soft_wrap=True, highlight=False)

    def _parts(self, record, now):
        yield f"loss {record['loss']:.3f}"
        yield f"{record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            yield f"MFU {record['mfu']:.1%}"
        if record["memory_in_use_bytes"] is not None:
            yield f"{record['memory_in_use_bytes'] / 1e9:.1f} GB"
        # The first step, which the clock starts behind, has no pace.
        if self._started is not None and record["step"] > self._first_step:
            pace = (now - self._started) / (record["step"] - self._first_step)
            yield f"{_clock(pace * (self._steps - record['step']))} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
