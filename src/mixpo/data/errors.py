"""The one error that bad input raises."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message stands alone on one line (or on one line per problem): where (file and row, or key), what was found,
    what was expected, what to do. The command line prints it without a traceback and exits with code 2.
    """
