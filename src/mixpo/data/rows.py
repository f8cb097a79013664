"""Preference and demonstration rows, parsed and validated from fields in the formats of Hugging Face data sets.

A row is read as it is or rejected with what was found, what was expected and how to fix it: no text is stripped,
repaired or guessed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from typing import NoReturn, TypedDict

from mixpo.data.errors import InputError


class Message(TypedDict):
    """One message of a dialogue: its role and its text."""

    role: str
    content: str


Prompt = str | list[Message]


def as_messages(prompt: Prompt) -> list[Message]:
    """Convert a prompt to a list of messages; a plain string becomes one user message."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def prompt_key(prompt: Prompt) -> str:
    """Canonical JSON of a prompt, the same whatever the order of a message's fields."""
    return json.dumps(prompt, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A row for supervised fine-tuning: a prompt and its completion."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference pair: a prompt with its chosen and its rejected completion."""

    prompt: Prompt
    chosen: str
    rejected: str
    category: str | None = None
    """Kind of prompt, such as `helpful`; a judge and a study report results by category."""


class RowError(ValueError):
    """Validation error of one row: the field (empty for the whole row) and the problem, as `is empty; ...`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class BadRow:
    """An invalid row with its location and problem; `row` is the line (JSON Lines, CSV) or row number, from 1."""

    file: str
    row: int
    field: str
    problem: str

    def __str__(self) -> str:
        subject = f"'{self.field}'" if self.field else "the row"
        return f"{self.file}:{self.row}: {subject} {self.problem}"


FIX_HINT = "drop the row or fix the source"
EQUAL_COMPLETIONS = f"equals 'chosen'; expected two different completions; {FIX_HINT}"
MESSAGE_FIELDS = ("role", "content")
EMPTY_VALUES: tuple[object, ...] = (None, "", [], {})
"""Values that count as an empty field."""
_MAX_LISTED_ROWS = 10


def raise_for_bad_rows(bad_rows: Sequence[BadRow], total: int) -> NoReturn:
    """Raise `InputError` with the number of invalid rows among `total` and the first ten of them."""
    lines = [f"{len(bad_rows)} of {total} rows cannot be used:", *map(str, bad_rows[:_MAX_LISTED_ROWS])]
    if len(bad_rows) > _MAX_LISTED_ROWS:
        lines.append(f"... and {len(bad_rows) - _MAX_LISTED_ROWS} more")
    lines.append("`data.on_bad_row: drop` leaves bad rows out and lists them in a file")
    raise InputError("\n".join(lines))


def count_repeats(rows: Sequence[Preference]) -> tuple[int, int]:
    """Count duplicate rows (all but the first of each) and contradictory rows (another row prefers the other side)."""
    pairs = [(prompt_key(row.prompt), row.chosen, row.rejected) for row in rows]
    distinct = set(pairs)
    contradictory = sum((prompt, rejected, chosen) in distinct for prompt, chosen, rejected in pairs)
    return len(pairs) - len(distinct), contradictory


def parse_preference(fields: Mapping[str, object]) -> Preference:
    """Parse a preference pair from a row's fields. Raises `RowError` if the row is invalid.

    `prompt` is text or a list of messages. `chosen` and `rejected` are text, a list of one assistant message, or whole
    dialogues that end with one. Whole dialogues contain the prompt: `prompt` is then optional and must agree with them.
    `system` (optional) is the text of a system message put before the prompt; with such a column every prompt is a list
    of messages. `category` is optional.
    """
    before_chosen, chosen = _split_completion(fields, "chosen")
    before_rejected, rejected = _split_completion(fields, "rejected")
    if before_chosen != before_rejected:
        raise RowError("rejected", _describe_prompt_difference(before_rejected, before_chosen))
    prompt = _parse_prompt(fields, "chosen", before_chosen)
    if chosen == rejected:
        raise RowError("rejected", EQUAL_COMPLETIONS)
    return Preference(_prepend_system_message(fields, prompt), chosen, rejected, _parse_category(fields))


def parse_demonstration(fields: Mapping[str, object]) -> Demonstration:
    """Parse a demonstration from a row's fields. Raises `RowError` if the row is invalid.

    `prompt` and `completion` as in `parse_preference`; or `messages`, a dialogue whose last message is the completion.
    """
    field = _find_completion_field(fields)
    before, completion = _split_completion(fields, field)
    return Demonstration(_prepend_system_message(fields, _parse_prompt(fields, field, before)), completion)


def demonstration_columns(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the columns that `parse_demonstration` reads from this row."""
    return ("prompt", _find_completion_field(fields), "system")


def _find_completion_field(fields: Mapping[str, object]) -> str:
    """Name of the field that holds a demonstration's completion: `messages` or `completion`."""
    return "messages" if "messages" in fields and "completion" not in fields else "completion"


def split_filled_columns(fields: Mapping[str, object], read: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the names of a row's non-empty columns into used ones (those in `read`) and ignored ones.

    Keys in a list of objects are columns by their path, such as `messages.tool_calls`; role and content of messages are
    always read.
    """
    filled = [name for name, value in fields.items() if value not in EMPTY_VALUES]
    used = [name for name in filled if name in read]
    ignored = [name for name in filled if name not in read]
    paths = dict.fromkeys(path for name in used for path in _ignored_in_messages(name, fields[name]))
    return used, [*ignored, *(path for path in paths if path not in read)]


def _ignored_in_messages(name: str, value: object) -> Iterator[str]:
    """Paths of the non-empty message fields other than role and content, such as `messages.tool_calls`."""
    for message in value if isinstance(value, list) else ():
        if isinstance(message, Mapping):
            yield from (
                f"{name}.{key}" for key in message if key not in MESSAGE_FIELDS and message[key] not in EMPTY_VALUES
            )


def _prepend_system_message(fields: Mapping[str, object], prompt: Prompt) -> Prompt:
    """Put the row's system message before the prompt; with a `system` column every prompt becomes messages."""
    if "system" not in fields:
        return prompt
    messages = as_messages(prompt)
    if fields["system"] in EMPTY_VALUES:
        return messages
    system = Message(role="system", content=_require_text("system", "", fields["system"]))
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise RowError(
            "system",
            f"differs from the dialogue's own system message; expected the same text, or only one of them; {FIX_HINT}",
        )
    return messages


def _parse_category(fields: Mapping[str, object]) -> str | None:
    return None if fields.get("category") in EMPTY_VALUES else _require_text("category", "", fields["category"])


def read_text_field(fields: Mapping[str, object], field: str) -> str:
    """Text of a field. Raises `RowError` if it is missing, empty or not text."""
    return _require_text(field, "", read_field(fields, field))


def make_excerpt(text: str) -> str:
    """First 40 characters of a text, quoted on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def describe_type(value: object) -> str:
    """Name of a value's JSON type, such as `a list`."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _split_completion(fields: Mapping[str, object], field: str) -> tuple[list[Message], str]:
    """Split a field into the messages before the completion (none if the field is text) and the completion."""
    value = read_field(fields, field)
    if not isinstance(value, list):
        return [], _require_text(field, "", value)
    *before, last = _parse_messages(field, value)
    if last["role"] != "assistant":
        raise RowError(field, f"has a last message from {last['role']!r}; expected 'assistant'; {FIX_HINT}")
    return before, last["content"]


def _parse_prompt(fields: Mapping[str, object], field: str, before: list[Message]) -> Prompt:
    """Prompt of a row: the field `prompt`, or else the messages before the completion in `field`."""
    if before and fields.get("prompt") is None:
        return _require_user_last(field, before)
    value = read_field(fields, "prompt")
    prompt = (
        _require_user_last("prompt", _parse_messages("prompt", value))
        if isinstance(value, list)
        else _require_text("prompt", "", value)
    )
    if not before:
        return prompt
    if before != as_messages(prompt):
        raise RowError(
            "prompt",
            f"differs from the first messages of the dialogue in '{field}'; expected the same messages; {FIX_HINT}",
        )
    return before


def _require_user_last(field: str, messages: list[Message]) -> list[Message]:
    """Messages of a prompt. Raises `RowError` if the last one is not the user's."""
    role = messages[-1]["role"]
    if role != "user":
        raise RowError(field, f"has a prompt whose last message is from {role!r}; expected 'user'; {FIX_HINT}")
    return messages


def _parse_messages(field: str, value: list[object]) -> list[Message]:
    """Parse a list of messages. Raises `RowError` if it is empty or one is invalid."""
    if not value:
        raise RowError(field, f"is empty; {FIX_HINT}")
    return [_parse_message(field, number, message) for number, message in enumerate(value, start=1)]


def _parse_message(field: str, number: int, value: object) -> Message:
    """Parse one message of a dialogue. Raises `RowError` unless it has a role and a content."""
    where = f"message {number}"
    if not isinstance(value, Mapping):
        raise RowError(
            field, f"{where} is {describe_type(value)}; expected an object with 'role' and 'content'; {FIX_HINT}"
        )
    if value.get("tool_calls") not in EMPTY_VALUES and value.get("content") in EMPTY_VALUES:
        raise RowError(
            field,
            f"{where} has 'tool_calls' and no 'content'; expected 'content': tool calls are not rendered; {FIX_HINT}",
        )
    for key in MESSAGE_FIELDS:
        if key not in value:
            raise RowError(field, f"{where} has no '{key}'; found {_join_names(value)}; rename the field or {FIX_HINT}")
    role, content = (_require_text(field, f"{where} '{key}' ", value[key]) for key in MESSAGE_FIELDS)
    return Message(role=role, content=content)


def read_field(fields: Mapping[str, object], field: str) -> object:
    """Value of a field. Raises `RowError` if it is missing, with the fields of the row or a similar name."""
    if field in fields:
        return fields[field]
    raise RowError(field, f"is missing; found {_join_names(fields)}; {_suggest_fix(fields, field)}")


def _suggest_fix(fields: Mapping[str, object], field: str) -> str:
    """Hint for a missing field: another format, or a field with a similar name."""
    if field == "prompt" and str(fields.get("chosen")).startswith("\n\nHuman:"):
        return "these look like raw HH-RLHF dialogues: read them with format hh-rlhf"
    if field == "completion" and "conversations" in fields:
        return "rename the column of dialogues to 'messages', each message with 'role' and 'content'"
    near = get_close_matches(field, fields, n=1)
    return f"did you mean {near[0]!r}? rename the field" if near else FIX_HINT


def _require_text(field: str, where: str, value: object) -> str:
    """Text of a value at `where` in a field. Raises `RowError` if it is empty or not text."""
    if not isinstance(value, str):
        raise RowError(field, f"{where}is {describe_type(value)}; expected text; {FIX_HINT}")
    if not value.strip():
        raise RowError(field, f"{where}is empty; {FIX_HINT}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"{where}has an unpaired surrogate at character {error.start + 1}; {FIX_HINT}") from error
    return value


def _describe_prompt_difference(rejected: list[Message], chosen: list[Message]) -> str:
    first = next(i for i, (a, b) in enumerate(zip_longest(rejected, chosen), start=1) if a != b)
    return (
        f"has another prompt than 'chosen': they differ from message {first} "
        f"('rejected' has {len(rejected)} messages, 'chosen' {len(chosen)}); expected equal prompts; {FIX_HINT}"
    )


def _join_names(fields: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in fields) or "no fields"
