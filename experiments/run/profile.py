"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

import re
from collections.abc import Callable
from pathlib import Path

import jax

from experiments.errors import UserError

PROFILE = "profile"


def profiled_steps(spec: str) -> tuple[int, int]:
    """Returns the first and the last step that START:STOP names, counted from 1.

    Raises:
        UserError: If it is anything else, or names no step.

    Example:
        >>> profiled_steps("10:12")
        (10, 12)
    """
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    start, stop = map(int, match.groups()) if match else (0, 0)
    if not 1 <= start <= stop:
        raise UserError(
            f"--profile must be START:STOP, two steps counted from 1, not {spec!r}; "
            "--profile 10:12 traces steps 10, 11 and 12"
        )
    return start, stop


class Profile:
    """Traces some steps of a run; a context manager that ends a trace under way.

    Args:
        spec: START:STOP, both included; None: nothing is traced.
        directory: Of the run; the trace goes to profile/ in it.
        say: Called with a line that says where it lies.
    """

    def __init__(self, spec: str | None, directory: Path, say: Callable[[str], None]):
        self._start, self._stop = profiled_steps(spec) if spec else (0, -1)
        self._directory = directory / PROFILE
        self._say = say
        self._is_tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def before(self, step: int, wait: Callable[[], object]) -> None:
        """Starts the trace, if it is to begin with this step.

        Args:
            step: The next one, counted from 1.
            wait: Returns when the device has done the steps before.
        """
        # A resumed run may begin in the middle.
        if not self._is_tracing and self._start <= step <= self._stop:
            wait()
            jax.profiler.start_trace(self._directory)
            self._is_tracing = True

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """Ends the trace, if this was its last step."""
        if self._is_tracing and step >= self._stop:
            wait()
            self._end()

    def _end(self):
        if not self._is_tracing:
            return
        self._is_tracing = False
        jax.profiler.stop_trace()
        self._say(
            f"profile in {self._directory}; look at it with tensorboard --logdir "
            f"{self._directory} (pip install tensorboard xprof)"
        )
