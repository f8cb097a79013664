"""The error for invalid user input."""


class InputError(ValueError):
    """Invalid user input: a setting, a file, a row or a model.

    The message has one line per problem: where (file and row, or key), what was found, what was expected, how to fix
    it. The command line prints it without a traceback and exits with code 2.
    """
