"""The error for invalid user input."""


class InputError(ValueError):
    """Exception for invalid user input: a setting, a file, a row or a model.

    The message has one line per problem: where (file and row, or key), what was found, what was expected, how to fix
    it. The command line prints it without a traceback and exits with code 2.
    """


def extract_first_line(error: BaseException, max_characters: int | None = 160) -> str:
    """First line of an error's message, cut to `max_characters` if given; its type's name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:max_characters]
