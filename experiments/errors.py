"""The one exception that the command line turns into one line and exit status 2."""

import sys


class UserError(Exception):
    """Bad input: the message says what, where and how to mend it, in one line."""


def print_error(error: Exception) -> None:
    """Prints the one line of an error on stderr."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
