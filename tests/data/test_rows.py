import pytest

from messages import FIX, assistant, error_message, row_error, user
from mixpo.data.rows import (
    BadRow,
    Demonstration,
    Preference,
    count_repeated_rows,
    list_demonstration_columns,
    make_prompt_key,
    parse_demonstration,
    parse_preference,
    raise_for_bad_rows,
    split_filled_columns,
)

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def whole(*prompt, chosen="Because.", rejected="No."):
    """Whole dialogues, of which the prompt is a part."""
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)]}


AS_MESSAGES = Preference([user("Why?")], "Because.", "No.")
PREFERENCES = {
    "text": (GOOD, Preference("Why?", "Because.", "No.")),
    "messages and text": (GOOD | {"prompt": [user("Why?")]}, AS_MESSAGES),
    "conversational": (whole() | {"prompt": [user("Why?")]}, AS_MESSAGES),
    "implicit prompt": (whole(user("Why?")), AS_MESSAGES),
    "implicit prompt beside an empty column": (whole(user("Why?")) | {"prompt": None}, AS_MESSAGES),
    "prompt repeated by whole dialogues": (whole(user("Why?")) | {"prompt": "Why?", "score_chosen": 8.5}, AS_MESSAGES),
    "many turns": (
        whole(user("a"), assistant("b"), user("c"), chosen="d", rejected="e"),
        Preference([user("a"), assistant("b"), user("c")], "d", "e"),
    ),
    "other keys of a message": (GOOD | {"prompt": [user("Why?") | {"name": None}]}, AS_MESSAGES),
    "nothing is stripped": (
        {"prompt": " Why?\n", "chosen": "\tBecause. ", "rejected": "No.\u2028"},
        Preference(" Why?\n", "\tBecause. ", "No.\u2028"),
    ),
    "category": (GOOD | {"category": "h"}, Preference("Why?", "Because.", "No.", "h")),
    "no category": (GOOD | {"category": None}, Preference("Why?", "Because.", "No.")),
    "an empty cell of CSV": (GOOD | {"category": ""}, Preference("Why?", "Because.", "No.")),
}


@pytest.mark.parametrize("shape", PREFERENCES)
def test_preferences_are_read_in_every_shape(shape):
    fields, expected = PREFERENCES[shape]
    assert parse_preference(fields) == expected


COMPLETE = {"prompt": "Why?", "completion": "Because."}
WHOLE = [user("Why?"), assistant("Because.")]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        (COMPLETE, "Why?"),
        ({"prompt": [user("Why?")], "completion": [assistant("Because.")]}, [user("Why?")]),
        ({"messages": WHOLE}, [user("Why?")]),
        ({"prompt": "Why?", "messages": WHOLE}, [user("Why?")]),
        (COMPLETE | {"messages": [user("Other?"), assistant("Other.")]}, "Why?"),
    ],
)
def test_demonstrations_are_read_in_every_shape(fields, prompt):
    assert parse_demonstration(fields) == Demonstration(prompt, "Because.")


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


INVALID_PREFERENCES = {
    "near name": (
        without("rejected") | {"rejcted": "No."},
        "'rejected' is missing; found 'prompt', 'chosen', 'rejcted'; did you mean 'rejcted'? rename the field",
    ),
    "no near name": (
        without("prompt") | {"question": "Why?"},
        f"'prompt' is missing; found 'chosen', 'rejected', 'question'; {FIX}",
    ),
    "nothing": ({}, f"'chosen' is missing; found no fields; {FIX}"),
    "another format": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "'prompt' is missing; found 'chosen', 'rejected'; "
        "these look like raw HH-RLHF dialogues: read them with format hh-rlhf",
    ),
    "empty": (GOOD | {"rejected": ""}, f"'rejected' is empty; {FIX}"),
    "whitespace": (GOOD | {"prompt": " \n\t"}, f"'prompt' is empty; {FIX}"),
    "no messages": (GOOD | {"prompt": []}, f"'prompt' is empty; {FIX}"),
    "number": (GOOD | {"chosen": 3}, f"'chosen' is a number; expected text; {FIX}"),
    "boolean": (GOOD | {"chosen": True}, f"'chosen' is a boolean; expected text; {FIX}"),
    "null": (GOOD | {"prompt": None}, f"'prompt' is null; expected text; {FIX}"),
    "object": (GOOD | {"prompt": {"a": 1}}, f"'prompt' is an object; expected text; {FIX}"),
    "bytes": (GOOD | {"prompt": b"Why?"}, f"'prompt' is bytes; expected text; {FIX}"),
    "surrogate": (GOOD | {"chosen": "ab\ud800"}, f"'chosen' has an unpaired surrogate at character 3; {FIX}"),
    "equal": (
        GOOD | {"rejected": "Because."},
        f"'rejected' equals 'chosen'; expected two different completions; {FIX}",
    ),
    "prompts differ": (
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
        "'rejected' has another prompt than 'chosen': they differ from message 2 "
        f"('rejected' has 1 messages, 'chosen' 3); expected equal prompts; {FIX}",
    ),
    "prompt and dialogues differ": (
        whole(user("a")) | {"prompt": [user("z")]},
        f"'prompt' differs from the first messages of the dialogue in 'chosen'; expected the same messages; {FIX}",
    ),
    "message is text": (
        GOOD | {"prompt": ["Why?"]},
        f"'prompt' message 1 is text; expected an object with 'role' and 'content'; {FIX}",
    ),
    "message without role": (
        GOOD | {"prompt": [user("Why?"), {"from": "human", "value": "?"}]},
        f"'prompt' message 2 has no 'role'; found 'from', 'value'; rename the field or {FIX}",
    ),
    "message without content": (
        GOOD | {"prompt": [{"role": "user"}]},
        f"'prompt' message 1 has no 'content'; found 'role'; rename the field or {FIX}",
    ),
    "message of parts": (
        GOOD | {"prompt": [user([{"type": "text"}])]},
        f"'prompt' message 1 'content' is a list; expected text; {FIX}",
    ),
    "prompt ends with the assistant": (
        GOOD | {"prompt": [user("Why?"), assistant("What?")]},
        f"'prompt' has a prompt whose last message is from 'assistant'; expected 'user'; {FIX}",
    ),
    "completion from the user": (
        GOOD | {"rejected": [user("No.")]},
        f"'rejected' has a last message from 'user'; expected 'assistant'; {FIX}",
    ),
    "category is a number": (GOOD | {"category": 3}, f"'category' is a number; expected text; {FIX}"),
}


@pytest.mark.parametrize("kind", INVALID_PREFERENCES)
def test_invalid_preferences(kind):
    fields, line = INVALID_PREFERENCES[kind]
    assert str(BadRow("hh.jsonl", 7, *row_error(parse_preference, fields))) == f"hh.jsonl:7: {line}"


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        (GOOD, "completion", f"is missing; found 'prompt', 'chosen', 'rejected'; {FIX}"),
        ({"prompt": "Why?", "completion": " "}, "completion", f"is empty; {FIX}"),
        (
            {"conversations": [{"from": "human", "value": "Why?"}]},
            "completion",
            "is missing; found 'conversations'; rename the column of dialogues to 'messages', each message with "
            "'role' and 'content'",
        ),
        ({"messages": []}, "messages", f"is empty; {FIX}"),
        ({"messages": [user("Why?")]}, "messages", f"has a last message from 'user'; expected 'assistant'; {FIX}"),
        (
            {"messages": [assistant("Hello."), assistant("Anyone?")]},
            "messages",
            f"has a prompt whose last message is from 'assistant'; expected 'user'; {FIX}",
        ),
        ({"messages": [assistant("Hello.")]}, "prompt", f"is missing; found 'messages'; {FIX}"),
    ],
)
def test_invalid_demonstrations(fields, field, problem):
    assert row_error(parse_demonstration, fields) == (field, problem)


@pytest.mark.parametrize(("count", "tail"), [(1, []), (10, []), (11, ["... and 1 more"]), (23, ["... and 13 more"])])
def test_error_lists_the_first_ten_bad_rows_and_counts_the_rest(count, tail):
    bad = [BadRow("hh.jsonl", row, "prompt", "is empty") for row in range(1, count + 1)]
    assert error_message(raise_for_bad_rows, bad, total_rows=40).splitlines() == [
        f"{count} of 40 rows cannot be used:",
        *(f"hh.jsonl:{row}: 'prompt' is empty" for row in range(1, min(count, 10) + 1)),
        *tail,
        "`data.on_bad_row: drop` leaves bad rows out and lists them in a file",
    ]


def system(content):
    return {"role": "system", "content": content}


BRIEF = [system("Be brief."), user("Why?")]


@pytest.mark.parametrize(
    ("prompt", "system_column", "expected"),
    [
        pytest.param("Why?", "Be brief.", BRIEF, id="text"),
        pytest.param([user("Why?")], "Be brief.", BRIEF, id="messages"),
        pytest.param(BRIEF, "Be brief.", BRIEF, id="said twice"),
        pytest.param("Why?", "", [user("Why?")], id="empty: messages, as the file's other prompts"),
        pytest.param("Why?", None, [user("Why?")], id="null"),
    ],
)
def test_a_system_column_becomes_the_first_message(prompt, system_column, expected):
    fields = {"prompt": prompt, "system": system_column}
    assert parse_preference({**GOOD, **fields}).prompt == expected
    assert parse_demonstration({**COMPLETE, **fields}).prompt == expected


def test_two_different_system_messages_are_a_bad_row():
    fields = {**GOOD, "prompt": [system("Be long."), user("Why?")], "system": "Be brief."}
    assert row_error(parse_preference, fields) == (
        "system",
        f"differs from the dialogue's own system message; expected the same text, or only one of them; {FIX}",
    )


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_tool_call_without_content_is_a_bad_row(content):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], **content}
    assert row_error(parse_demonstration, {"messages": [user("Why?"), call]}) == (
        "messages",
        f"message 2 has 'tool_calls' and no 'content'; expected 'content': tool calls are not rendered; {FIX}",
    )


def test_ignored_columns_are_listed_unless_empty():
    call = {**assistant("I look."), "tool_calls": [{"function": {"name": "f"}}], "name": "bot", "tool_call_id": None}
    fields = {
        "id": 0,
        "messages": [user("Why?"), call, {"role": "tool", "content": "42", "tool_call_id": "a"}, assistant("42.")],
        "tools": [{"name": "f"}],
        "system": "",
        "score": 0.0,
        "note": None,
        "labels": [],
    }
    assert split_filled_columns(fields, list_demonstration_columns(fields)) == (
        ["messages"],
        ["id", "tools", "score", "messages.tool_calls", "messages.name", "messages.tool_call_id"],
    )
    both = {"prompt": "Why?", "completion": "So.", "messages": [user("Why?"), assistant("No.")]}
    assert split_filled_columns(both, list_demonstration_columns(both)) == (["prompt", "completion"], ["messages"])


def test_duplicate_and_contradictory_rows_are_counted():
    pairs = [("a", "x", "y"), ("a", "x", "y"), ("a", "y", "x"), ("b", "y", "x"), ("b", "x", "z"), ("a", "x", "y")]
    rows = [Preference([user(prompt)], *sides) for prompt, *sides in pairs]
    duplicate = sum(pairs[n] in pairs[:n] for n in range(len(pairs)))
    contradictory = sum((prompt, rejected, chosen) in pairs for prompt, chosen, rejected in pairs)
    assert count_repeated_rows(rows) == (duplicate, contradictory) == (2, 4)


def test_equal_prompts_have_one_key():
    assert make_prompt_key([{"role": "user", "content": "a"}]) == make_prompt_key([{"content": "a", "role": "user"}])
    assert make_prompt_key("a") != make_prompt_key([user("a")])
