"""What comes back from a judge: a chat completion, and the two scores in it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

HIGHEST = 10.0
"""Scores go from 0, "not related to the question", to a point for each of the prompt's ten dimensions."""
MOST_TOKENS = 10**9
"""Of a prompt or a completion; a server that counts more cannot be believed."""
_LABEL = re.compile(r"Response ([0-9]+) Quality Score:")
_SCORE = re.compile(r"[ \t]*([0-9]{1,20}(?:\.[0-9]{1,20})?)(?:/10)?[ \t]*(?:\r?\n|\Z|(?=Explanation:))")


@dataclass(frozen=True)
class Reply:
    """A server's reply."""

    text: str | None
    """Empty where it is a chat completion without any, such as a refusal; None where it is none."""
    cut: bool = False
    """Whether it ended because it was as long as it may be."""
    tokens: tuple[int, int] | None = None
    """Of prompt and completion as the server counts them; None where it does not say."""


def read_reply(body: bytes) -> Reply:
    """A chat completion from a reply's body."""
    try:
        content = json.loads(body)
        tokens = _tokens(content.get("usage"))
    except (ValueError, AttributeError, RecursionError):
        return Reply(None)
    try:
        choice = content["choices"][0]
        text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (LookupError, TypeError, AttributeError):
        return Reply(None, tokens=tokens)
    return Reply(text if isinstance(text, str) else "", cut, tokens)


def read_error(body: bytes) -> str:
    """What a server says of an error: its message if there is one, else all of it."""
    try:
        content = json.loads(body)
        message = content.get("error", content)["message"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        message = None
    return message if isinstance(message, str) else body.decode(errors="replace")


def _tokens(usage: object) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is int and type(completion) is int and all(0 <= n <= MOST_TOKENS for n in (prompt, completion)):
        return prompt, completion
    return None


def total(replies: Sequence[Reply]) -> tuple[int, int] | None:
    """The tokens of several replies together; None where those of one are not known."""
    known = [reply.tokens for reply in replies if reply.tokens is not None]
    return (sum(one for one, _ in known), sum(two for _, two in known)) if len(known) == len(replies) else None


def scores(reply: Reply) -> tuple[float, float] | None:
    """The scores of both completions in the order shown, as the paper's prompt asks for them; None if it has others.

    `Response 1 Quality Score: x`, then `Response 2 Quality Score: x`, each once, x from 0 to 10 with nothing behind it
    but `/10`, the end of the line or `Explanation:`. Bold type is read over, and so is a last word that was cut.
    """
    text = (reply.text or "").replace("**", "")
    text = _without_last_word(text) if reply.cut else text
    labels = list(_LABEL.finditer(text))
    found = [_SCORE.match(text, label.end()) for label in labels]
    if [label[1] for label in labels] != ["1", "2"]:
        return None
    values = [float(one[1]) for one in found if one is not None]
    if len(values) < 2 or max(values) > HIGHEST:
        return None
    return values[0], values[1]


def _without_last_word(text: str) -> str:
    """A text up to its last blank; a regular expression would look for the end from every letter."""
    end = len(text)
    while end and not text[end - 1].isspace():
        end -= 1
    return text[:end]
