"""What the terminal shows during training: a bar, or plain lines where it is a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Loss, tokens per second and time left, as a context manager.

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
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, text="")
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Shows that a step has been started."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, tokens_per_second: float, left: float):
        """Shows the numbers of a logged step.

        Args:
            step: Steps done.
            loss: Nats per token of this step.
            tokens_per_second: Since the last call.
            left: Seconds until the last step at the pace of the run.
        """
        minutes, seconds = divmod(round(left), 60)
        text = (
            f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
            f"{minutes}:{seconds:02d} left"
        )
        self._bar.update(self._task, text=text)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps
        if is_due and not self._console.is_terminal:
            self._console.print(f"step {step}/{self._steps}  {text}", soft_wrap=True)
            self._last_line = now

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, soft_wrap=True, highlight=False)
