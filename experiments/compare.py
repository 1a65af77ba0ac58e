"""Every method side by side: ``python -m experiments.compare cpu-small --out DIR``.

One process per run; what is done is skipped, what was interrupted is resumed. Results
are lines of results.jsonl; then come a table in Markdown and figures. A suite of
several tasks has a directory for each task, and a table that joins them.
"""

import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.comparison.options import parse_options
from experiments.comparison.tasks import comparison_of
from experiments.errors import UserError, print_error

# Ways to be told to stop; a lost terminal is one.
_STOPS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done; 2: a mistake of the user's, told in one line on stderr; 130: interrupted.
    """
    console = Console(markup=False, emoji=False)
    # They stop it as Ctrl-C does: runs under way save and end.
    previous = {
        number: signal.signal(number, signal.default_int_handler)
        for number in _STOPS
        # Under nohup a lost terminal is to be ignored.
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        with comparison_of(options, console) as comparison:
            comparison.check_rates()
            try:
                comparison.run()
            finally:
                comparison.report()
    except (UserError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to go on")
        return 128 + signal.SIGINT
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
