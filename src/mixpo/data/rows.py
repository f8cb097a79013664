"""What a row is, and what makes one bad.

A row comes from a mapping of fields in any of the shapes of Hugging Face preference data sets, and is taken exactly or
refused with what was found, what was expected and what to do: no text is stripped, repaired or guessed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from typing import NoReturn, TypedDict

from mixpo.data.errors import InputError


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    content: str


Prompt = str | list[Message]


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt; text alone is the user's."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def prompt_key(prompt: Prompt) -> str:
    """Text that is the same for equal prompts, in whatever order a file has the fields of a message."""
    return json.dumps(prompt, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the completion to imitate."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two completions, the first preferred to the second."""

    prompt: Prompt
    chosen: str
    rejected: str
    category: str | None = None
    """What kind of prompt it is, such as `helpful`: a judge and a study report each kind apart."""


class RowError(ValueError):
    """Why one row cannot be used: the field (empty for the row as a whole) and a problem that reads on from it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and where it stands: `row` counts lines (JSON Lines, CSV) or rows from 1."""

    file: str
    row: int
    field: str
    problem: str

    def __str__(self) -> str:
        subject = f"'{self.field}'" if self.field else "the row"
        return f"{self.file}:{self.row}: {subject} {self.problem}"


FIX = "drop the row or fix the source"
EQUAL_SIDES = f"equals 'chosen'; expected two different completions; {FIX}"
MESSAGE = ("role", "content")
"""The fields of a message."""
NOTHING: tuple[object, ...] = (None, "", [], {})
"""What a column holds where a row has nothing in it."""
_LISTED = 10


def refuse_bad_rows(bad: Sequence[BadRow], total: int) -> NoReturn:
    """Raise `InputError` over the bad rows among `total`, the first ten of them a line each."""
    lines = [f"{len(bad)} of {total} rows cannot be used:", *map(str, bad[:_LISTED])]
    if len(bad) > _LISTED:
        lines.append(f"... and {len(bad) - _LISTED} more")
    lines.append("`data.on_bad_row: drop` leaves bad rows out and lists them in a file")
    raise InputError("\n".join(lines))


def count_repeats(rows: Sequence[Preference]) -> tuple[int, int]:
    """Count duplicate rows (all but the first of each), and contradictory ones: another row exchanges their sides."""
    pairs = [(prompt_key(row.prompt), row.chosen, row.rejected) for row in rows]
    different = set(pairs)
    contradictory = sum((prompt, rejected, chosen) in different for prompt, chosen, rejected in pairs)
    return len(pairs) - len(different), contradictory


def parse_preference(fields: Mapping[str, object]) -> Preference:
    """Read a preference from a row's fields, or raise `RowError`.

    `prompt` is text or a list of messages. `chosen` and `rejected` are text, a list of one assistant message, or whole
    dialogues that end with one; whole dialogues carry the prompt, so that `prompt` may be left out, and must agree
    with it where it is there. `system` is the text of a system message in front of the prompt, which a column of that
    name makes a list of messages. `system` and `category` may be left out.
    """
    before_chosen, chosen = _completion(fields, "chosen")
    before_rejected, rejected = _completion(fields, "rejected")
    if before_chosen != before_rejected:
        raise RowError("rejected", _difference(before_rejected, before_chosen))
    prompt = _prompt(fields, "chosen", before_chosen)
    if chosen == rejected:
        raise RowError("rejected", EQUAL_SIDES)
    return Preference(_with_system(fields, prompt), chosen, rejected, _category(fields))


def parse_demonstration(fields: Mapping[str, object]) -> Demonstration:
    """Read a demonstration from a row's fields, or raise `RowError`.

    `prompt` and `completion` as in `parse_preference`; or `messages`, a dialogue whose last message is the completion.
    """
    field = _demonstrated(fields)
    before, completion = _completion(fields, field)
    return Demonstration(_with_system(fields, _prompt(fields, field, before)), completion)


def preference_columns(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Name the columns that `parse_preference` reads."""
    return ("prompt", "chosen", "rejected", "system", "category")


def demonstration_columns(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Name the columns that `parse_demonstration` reads."""
    return ("prompt", _demonstrated(fields), "system")


def _demonstrated(fields: Mapping[str, object]) -> str:
    return "messages" if "messages" in fields and "completion" not in fields else "completion"


def columns_with_content(fields: Mapping[str, object], read: Sequence[str]) -> tuple[list[str], list[str]]:
    """Name the columns that hold something: those among `read`, and those that nothing reads.

    A message's fields beside role and content, such as `tool_calls`, are columns too: `messages.tool_calls`.
    """
    filled = [name for name, value in fields.items() if value not in NOTHING]
    used = [name for name in filled if name in read]
    unread = [name for name in filled if name not in read]
    return used, [*unread, *dict.fromkeys(path for name in used for path in _unread_in_messages(name, fields[name]))]


def _unread_in_messages(name: str, value: object) -> Iterator[str]:
    for message in value if isinstance(value, list) else ():
        if isinstance(message, Mapping):
            yield from (f"{name}.{key}" for key in message if key not in MESSAGE and message[key] not in NOTHING)


def _with_system(fields: Mapping[str, object], prompt: Prompt) -> Prompt:
    """Put the row's system message in front of a prompt; all prompts of a file with that column are messages."""
    if "system" not in fields:
        return prompt
    messages = as_messages(prompt)
    if fields["system"] in NOTHING:
        return messages
    system = Message(role="system", content=_text("system", "", fields["system"]))
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise RowError("system", f"is not the system message of the dialogue; expected the same or one of them; {FIX}")
    return messages


def _category(fields: Mapping[str, object]) -> str | None:
    return None if fields.get("category") in NOTHING else _text("category", "", fields["category"])


def read_text_field(fields: Mapping[str, object], field: str) -> str:
    """Return a field that must be text with something in it, or raise `RowError`."""
    return _text(field, "", _value(fields, field))


def excerpt(text: str) -> str:
    """Quote the first characters of a text on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def kind_of(value: object) -> str:
    """Name a value's type in the words of JSON."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _completion(fields: Mapping[str, object], field: str) -> tuple[list[Message], str]:
    """Split a field into the messages that come before the completion (none where it is text) and the completion."""
    value = _value(fields, field)
    if not isinstance(value, list):
        return [], _text(field, "", value)
    *before, last = _messages(field, value)
    if last["role"] != "assistant":
        raise RowError(field, f"ends with a message from {last['role']!r}; expected one from 'assistant'; {FIX}")
    return before, last["content"]


def _prompt(fields: Mapping[str, object], field: str, before: list[Message]) -> Prompt:
    """Return the prompt: the field of that name, or else the messages before the completion in `field`."""
    if before and fields.get("prompt") is None:
        return _asked(field, before)
    value = _value(fields, "prompt")
    prompt = _asked("prompt", _messages("prompt", value)) if isinstance(value, list) else _text("prompt", "", value)
    if not before:
        return prompt
    if before != as_messages(prompt):
        raise RowError(
            "prompt", f"is not what the dialogue in '{field}' begins with; expected the same messages; {FIX}"
        )
    return before


def _asked(field: str, messages: list[Message]) -> list[Message]:
    """Return a prompt's messages if the last one is the user's."""
    role = messages[-1]["role"]
    if role != "user":
        raise RowError(field, f"has a prompt that ends with a message from {role!r}; expected one from 'user'; {FIX}")
    return messages


def _messages(field: str, value: list[object]) -> list[Message]:
    if not value:
        raise RowError(field, f"is empty; {FIX}")
    return [_message(field, number, message) for number, message in enumerate(value, start=1)]


def _message(field: str, number: int, value: object) -> Message:
    where = f"message {number}"
    if not isinstance(value, Mapping):
        raise RowError(field, f"{where} is {kind_of(value)}; expected an object with 'role' and 'content'; {FIX}")
    if value.get("tool_calls") not in NOTHING and value.get("content") in NOTHING:
        raise RowError(
            field, f"{where} calls a tool and says nothing; expected 'content': tool calls are not rendered; {FIX}"
        )
    for key in MESSAGE:
        if key not in value:
            raise RowError(field, f"{where} has no '{key}'; found {_names(value)}; rename the field or {FIX}")
    role, content = (_text(field, f"{where} '{key}' ", value[key]) for key in MESSAGE)
    return Message(role=role, content=content)


def _value(fields: Mapping[str, object], field: str) -> object:
    if field in fields:
        return fields[field]
    raise RowError(field, f"is missing; found {_names(fields)}; {_remedy(fields, field)}")


def _remedy(fields: Mapping[str, object], field: str) -> str:
    if field == "prompt" and str(fields.get("chosen")).startswith("\n\nHuman:"):
        return "these look like raw HH-RLHF dialogues: read them with format hh-rlhf"
    if field == "completion" and "conversations" in fields:
        return "name the column of dialogues 'messages'; each message has 'role' and 'content'"
    near = get_close_matches(field, fields, n=1)
    return f"did you mean {near[0]!r}? rename the field" if near else FIX


def _text(field: str, where: str, value: object) -> str:
    """Return a value that must be text; `where` in the field it stands is empty for all of it."""
    if not isinstance(value, str):
        raise RowError(field, f"{where}is {kind_of(value)}; expected text; {FIX}")
    if not value.strip():
        raise RowError(field, f"{where}is empty; {FIX}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"{where}has half a surrogate pair at character {error.start + 1}; {FIX}") from error
    return value


def _difference(rejected: list[Message], chosen: list[Message]) -> str:
    first = next(i for i, (a, b) in enumerate(zip_longest(rejected, chosen), start=1) if a != b)
    return (
        f"has another prompt than 'chosen': they differ from message {first} on "
        f"('rejected' has {len(rejected)}, 'chosen' {len(chosen)}); expected the same prompt on both sides; {FIX}"
    )


def _names(fields: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in fields) or "no fields"
