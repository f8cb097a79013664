"""What every group of settings has in common, and how a problem with one is told."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pydantic
from pydantic_core import ErrorDetails

EXPECTED = {
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "path_type": "a path",
    "too_short": "at least one value",
}
"""Pydantic's kinds of problems that it tells in words of Python."""


class Settings(pydantic.BaseModel):
    """A frozen group of settings: unknown keys, infinite and undefined numbers are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_true_for_1(cls, value: Any, field: pydantic.ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[str(field.field_name)].annotation))
        several = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(one, bool) for one in several):
            raise ValueError("a number, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def found_and_expected(problem: ErrorDetails) -> tuple[str, str]:
    """What pydantic found, cut where it is long, and what it expected instead."""
    value = problem["input"]
    found = "nothing" if value is None else repr(value)
    expected = re.sub("^Input should be |^Value error, |, unable to .*", "", problem["msg"])
    return found if len(found) <= 200 else f"{found[:200]}…", EXPECTED.get(problem["type"], expected)
