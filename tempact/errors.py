"""What a user did wrong, as opposed to what the code did wrong."""


class UserError(ValueError):
    """Bad input. The message is one line: the file, key or row, what was found, what is accepted.

    Entry points print it without a traceback and exit with code 2.
    """
