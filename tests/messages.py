"""Messages of dialogues, and what parsers and readers say of bad ones."""

from collections.abc import Callable
from typing import Any

import pytest

from mixpo.data.errors import InputError
from mixpo.data.rows import RowError

FIX = "drop the row or fix the source"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def row_error(parse: Callable[..., Any], fields: Any) -> tuple[str, str]:
    """The field and the problem of the `RowError` that a parser raises."""
    with pytest.raises(RowError) as caught:
        parse(fields)
    return caught.value.field, caught.value.problem


def error_message(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the `InputError` that a call raises, or the iteration over what it returns."""
    with pytest.raises(InputError) as caught:
        list(call(*arguments, **options))
    return str(caught.value)
