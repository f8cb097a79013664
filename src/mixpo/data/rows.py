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


def convert_to_messages(prompt: Prompt) -> list[Message]:
    """A prompt as a list of messages: a text becomes one user message, a list is returned as it is."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def make_prompt_key(prompt: Prompt) -> str:
    """Canonical JSON of a prompt, for comparing prompts: the same whatever the order of a message's fields."""
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
    """Exception for one invalid row: the field (empty for the whole row) and the problem, as `is empty; ...`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class BadRow:
    """Record of an invalid row: file, line number (JSON Lines, CSV) or row number from 1, field and problem."""

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


def raise_for_bad_rows(bad_rows: Sequence[BadRow], total_rows: int) -> NoReturn:
    """Always raise `InputError`, with the number of bad rows among `total_rows` and the first ten of them."""
    lines = [f"{len(bad_rows)} of {total_rows} rows cannot be used:", *map(str, bad_rows[:_MAX_LISTED_ROWS])]
    if len(bad_rows) > _MAX_LISTED_ROWS:
        lines.append(f"... and {len(bad_rows) - _MAX_LISTED_ROWS} more")
    lines.append("`data.on_bad_row: drop` leaves bad rows out and lists them in a file")
    raise InputError("\n".join(lines))


def count_repeated_rows(rows: Sequence[Preference]) -> tuple[int, int]:
    """Numbers of duplicate rows (all but the first) and of contradictory rows (another row prefers the other side)."""
    pairs = [(make_prompt_key(row.prompt), row.chosen, row.rejected) for row in rows]
    distinct = set(pairs)
    contradictory = sum((prompt, rejected, chosen) in distinct for prompt, chosen, rejected in pairs)
    return len(pairs) - len(distinct), contradictory


def parse_preference(row_fields: Mapping[str, object]) -> Preference:
    """Parse the fields of a row (prompt, chosen, rejected, ...) to a preference pair. Raises `RowError` if invalid.

    `prompt` is text or a list of messages. `chosen` and `rejected` are text, a list of one assistant message, or whole
    dialogues that end with one. Whole dialogues contain the prompt: `prompt` is then optional and must agree with them.
    `system` (optional) is the text of a system message put before the prompt; with such a column every prompt is a list
    of messages. `category` is optional.
    """
    before_chosen, chosen = _split_completion(row_fields, "chosen")
    before_rejected, rejected = _split_completion(row_fields, "rejected")
    if before_chosen != before_rejected:
        raise RowError("rejected", _describe_prompt_difference(before_rejected, before_chosen))
    prompt = _parse_prompt(row_fields, "chosen", before_chosen)
    if chosen == rejected:
        raise RowError("rejected", EQUAL_COMPLETIONS)
    return Preference(_prepend_system_message(row_fields, prompt), chosen, rejected, _parse_category(row_fields))


def parse_demonstration(row_fields: Mapping[str, object]) -> Demonstration:
    """Parse a row's `prompt` and `completion`, or `messages`, to a demonstration. Raises `RowError` if invalid."""
    field = _choose_completion_field(row_fields)
    before, completion = _split_completion(row_fields, field)
    return Demonstration(_prepend_system_message(row_fields, _parse_prompt(row_fields, field, before)), completion)


def list_demonstration_columns(row_fields: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the columns from which `parse_demonstration` reads this row: prompt, completion or messages, system."""
    return ("prompt", _choose_completion_field(row_fields), "system")


def _choose_completion_field(row_fields: Mapping[str, object]) -> str:
    """Name of the field with a demonstration's completion: `messages` if only that is there, else `completion`."""
    return "messages" if "messages" in row_fields and "completion" not in row_fields else "completion"


def split_filled_columns(row_fields: Mapping[str, object], read_columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of a row's non-empty columns as two lists: those in `read_columns`, and the others, which are ignored.

    Keys in a list of objects are columns by their path, such as `messages.tool_calls`; role and content of messages are
    always read.
    """
    filled = [name for name, value in row_fields.items() if value not in EMPTY_VALUES]
    used = [name for name in filled if name in read_columns]
    ignored = [name for name in filled if name not in read_columns]
    paths = dict.fromkeys(path for name in used for path in _list_ignored_message_keys(name, row_fields[name]))
    return used, [*ignored, *(path for path in paths if path not in read_columns)]


def _list_ignored_message_keys(column: str, value: object) -> Iterator[str]:
    """Yield the paths of non-empty message fields that are not read, such as `messages.tool_calls`."""
    for message in value if isinstance(value, list) else ():
        if isinstance(message, Mapping):
            yield from (
                f"{column}.{key}" for key in message if key not in MESSAGE_FIELDS and message[key] not in EMPTY_VALUES
            )


def _prepend_system_message(row_fields: Mapping[str, object], prompt: Prompt) -> Prompt:
    """Prompt with the row's system message before it, if any; with a `system` column always a list of messages."""
    if "system" not in row_fields:
        return prompt
    messages = convert_to_messages(prompt)
    if row_fields["system"] in EMPTY_VALUES:
        return messages
    system = Message(role="system", content=_require_text("system", "", row_fields["system"]))
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise RowError(
            "system",
            f"differs from the dialogue's own system message; expected the same text, or only one of them; {FIX_HINT}",
        )
    return messages


def _parse_category(row_fields: Mapping[str, object]) -> str | None:
    """Category of a row; None if the field is missing or empty. Raises `RowError` if it is not text."""
    return None if row_fields.get("category") in EMPTY_VALUES else _require_text("category", "", row_fields["category"])


def read_text_field(row_fields: Mapping[str, object], field: str) -> str:
    """Text of a row's field. Raises `RowError` if it is missing, blank or not text."""
    return _require_text(field, "", read_field(row_fields, field))


def make_excerpt(text: str) -> str:
    """First 40 characters of a text, in quotes on one line, with … if it is longer; for messages."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def describe_type(value: object) -> str:
    """JSON type of a value in words, such as `a list` or `null`."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _split_completion(row_fields: Mapping[str, object], field: str) -> tuple[list[Message], str]:
    """Split a dialogue into its messages before the completion and the completion; a text has no messages before it."""
    value = read_field(row_fields, field)
    if not isinstance(value, list):
        return [], _require_text(field, "", value)
    *before, last = _parse_messages(field, value)
    if last["role"] != "assistant":
        raise RowError(field, f"has a last message from {last['role']!r}; expected 'assistant'; {FIX_HINT}")
    return before, last["content"]


def _parse_prompt(row_fields: Mapping[str, object], completion_field: str, messages_before: list[Message]) -> Prompt:
    """Prompt of a row: the field `prompt`, or the messages before the completion. Raises `RowError` if they differ."""
    if messages_before and row_fields.get("prompt") is None:
        return _require_user_last(completion_field, messages_before)
    value = read_field(row_fields, "prompt")
    prompt = (
        _require_user_last("prompt", _parse_messages("prompt", value))
        if isinstance(value, list)
        else _require_text("prompt", "", value)
    )
    if not messages_before:
        return prompt
    if messages_before != convert_to_messages(prompt):
        raise RowError(
            "prompt",
            f"differs from the first messages of the dialogue in '{completion_field}'; expected the same messages; "
            f"{FIX_HINT}",
        )
    return messages_before


def _require_user_last(field: str, messages: list[Message]) -> list[Message]:
    """The messages of a prompt, unchanged. Raises `RowError` if the last one is not the user's."""
    role = messages[-1]["role"]
    if role != "user":
        raise RowError(field, f"has a prompt whose last message is from {role!r}; expected 'user'; {FIX_HINT}")
    return messages


def _parse_messages(field: str, messages: list[object]) -> list[Message]:
    """Check and convert a list of messages. Raises `RowError` if it is empty or a message is invalid."""
    if not messages:
        raise RowError(field, f"is empty; {FIX_HINT}")
    return [_parse_message(field, number, message) for number, message in enumerate(messages, start=1)]


def _parse_message(field: str, message_number: int, value: object) -> Message:
    """Check and convert one message of a dialogue. Raises `RowError` unless it has a role and a content."""
    where = f"message {message_number}"
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
            raise RowError(
                field, f"{where} has no '{key}'; found {_quote_names(value)}; rename the field or {FIX_HINT}"
            )
    role, content = (_require_text(field, f"{where} '{key}' ", value[key]) for key in MESSAGE_FIELDS)
    return Message(role=role, content=content)


def read_field(row_fields: Mapping[str, object], field: str) -> object:
    """Value of a row's field. Raises `RowError` if it is missing, naming the row's fields and a hint."""
    if field in row_fields:
        return row_fields[field]
    raise RowError(field, f"is missing; found {_quote_names(row_fields)}; {_suggest_field(row_fields, field)}")


def _suggest_field(row_fields: Mapping[str, object], field: str) -> str:
    """Hint, as text, for a missing field: another row format, or a field with a similar name."""
    if field == "prompt" and str(row_fields.get("chosen")).startswith("\n\nHuman:"):
        return "these look like raw HH-RLHF dialogues: read them with format hh-rlhf"
    if field == "completion" and "conversations" in row_fields:
        return "rename the column of dialogues to 'messages', each message with 'role' and 'content'"
    near = get_close_matches(field, row_fields, n=1)
    return f"did you mean {near[0]!r}? rename the field" if near else FIX_HINT


def _require_text(field: str, location: str, value: object) -> str:
    """The value itself, if it is non-blank text; else raises `RowError`, naming its `location` in the field."""
    if not isinstance(value, str):
        raise RowError(field, f"{location}is {describe_type(value)}; expected text; {FIX_HINT}")
    if not value.strip():
        raise RowError(field, f"{location}is empty; {FIX_HINT}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            field, f"{location}has an unpaired surrogate at character {error.start + 1}; {FIX_HINT}"
        ) from error
    return value


def _describe_prompt_difference(rejected_prompt: list[Message], chosen_prompt: list[Message]) -> str:
    """Problem, as text, of a pair whose sides have different prompts: the first message that differs."""
    first = next(i for i, (a, b) in enumerate(zip_longest(rejected_prompt, chosen_prompt), start=1) if a != b)
    return (
        f"has another prompt than 'chosen': they differ from message {first} "
        f"('rejected' has {len(rejected_prompt)} messages, 'chosen' {len(chosen_prompt)}); expected equal prompts; "
        f"{FIX_HINT}"
    )


def _quote_names(row_fields: Mapping[str, object]) -> str:
    """Names of a row's fields, quoted and joined by commas; `no fields` if there are none."""
    return ", ".join(repr(name) for name in row_fields) or "no fields"
