"""The one exception that the command line turns into one line and exit status 2."""


class UserError(Exception):
    """Bad input: the message says what, where and how to mend it, in one line."""
