"""The base class of all settings, and the wording of values that pydantic refuses."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pydantic
from pydantic_core import ErrorDetails

EXPECTED_BY_ERROR_TYPE = {
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "path_type": "a path",
    "too_short": "at least one value",
}
"""Expected values by pydantic's error type, where its own message speaks of Python types."""


class Settings(pydantic.BaseModel):
    """Base class of frozen settings, which refuse unknown keys and infinite or undefined numbers."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: Any, field: pydantic.ValidationInfo) -> Any:
        """Raise ValueError on true or false where a setting is a number, which pydantic would accept."""
        types = set(_flatten_annotation(cls.model_fields[str(field.field_name)].annotation))
        items = value if isinstance(value, list | tuple) else [value]
        if types & {int, float} and bool not in types and any(isinstance(item, bool) for item in items):
            raise ValueError("a number, not true or false")
        return value


def _flatten_annotation(annotation: Any) -> Iterator[Any]:
    """Yield a type annotation and, recursively, its type arguments."""
    yield annotation
    for part in get_args(annotation):
        yield from _flatten_annotation(part)


def format_found_and_expected(error: ErrorDetails) -> tuple[str, str]:
    """Return two texts: the value that pydantic refused, cut after 200 characters, and what was expected instead."""
    value = error["input"]
    found = "nothing" if value is None else repr(value)
    expected = re.sub("^Input should be |^Value error, |, unable to .*", "", error["msg"])
    return found if len(found) <= 200 else f"{found[:200]}…", EXPECTED_BY_ERROR_TYPE.get(error["type"], expected)
