"""Parsing of a judge's replies: the chat completion, its token counts, and the two scores in its text."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SCORE = 10.0
"""Highest score; the prompt's ten dimensions give a point each, and 0 is "not related to the question"."""
MAX_TOKENS = 10**9
"""Largest credible token count of a prompt or a completion."""
_LABEL = re.compile(r"Response ([0-9]+) Quality Score:")
_SCORE = re.compile(r"[ \t]*([0-9]{1,20}(?:\.[0-9]{1,20})?)(?:/10)?[ \t]*(?:\r?\n|\Z|(?=Explanation:))")


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply, parsed: text of the completion, whether truncated, and token counts."""

    text: str | None
    """The completion, empty without content such as at a refusal; None if the body is no chat completion."""
    truncated: bool = False
    """Whether the reply ended at its token limit."""
    tokens: tuple[int, int] | None = None
    """Token counts of prompt and completion; None where the server gives none."""


def parse_reply(json_body: bytes) -> JudgeReply:
    """Parse the JSON body of a chat completion; any other body gives a reply whose text is None, without an error."""
    try:
        content = json.loads(json_body)
        tokens = _parse_usage(content.get("usage"))
    except (ValueError, AttributeError, RecursionError):
        return JudgeReply(None)
    try:
        choice = content["choices"][0]
        text, truncated = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (LookupError, TypeError, AttributeError):
        return JudgeReply(None, tokens=tokens)
    return JudgeReply(text if isinstance(text, str) else "", truncated, tokens)


def parse_error_message(body: bytes) -> str:
    """Return the message of an HTTP error's JSON body, or the whole body if it has none."""
    try:
        content = json.loads(body)
        message = content.get("error", content)["message"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        message = None
    return message if isinstance(message, str) else body.decode(errors="replace")


def _parse_usage(usage: object) -> tuple[int, int] | None:
    """Return the token counts of prompt and completion; None where they are missing or not credible."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is int and type(completion) is int and all(0 <= n <= MAX_TOKENS for n in (prompt, completion)):
        return prompt, completion
    return None


def sum_token_counts(replies: Sequence[JudgeReply]) -> tuple[int, int] | None:
    """Sum prompt tokens and completion tokens of several replies; None where one is unknown."""
    counts = [reply.tokens for reply in replies if reply.tokens is not None]
    if len(counts) < len(replies):
        return None
    return sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts)


def parse_scores(reply: JudgeReply) -> tuple[float, float] | None:
    """Parse both completions' scores (0 to 10) in the order shown; None unless written as the paper's prompt asks.

    The format is `Response 1 Quality Score: x`, then `Response 2 Quality Score: x`, each once, x from 0 to 10, with
    nothing after it but `/10`, the end of the line or `Explanation:`. Bold marks and a truncated last word are ignored.
    """
    text = (reply.text or "").replace("**", "")
    text = _drop_truncated_word(text) if reply.truncated else text
    labels = list(_LABEL.finditer(text))
    matches = [_SCORE.match(text, label.end()) for label in labels]
    if [label[1] for label in labels] != ["1", "2"]:
        return None
    values = [float(match[1]) for match in matches if match is not None]
    if len(values) < 2 or max(values) > MAX_SCORE:
        return None
    return values[0], values[1]


def _drop_truncated_word(text: str) -> str:
    """Return a text up to its last blank, in linear time: a regular expression would be quadratic here."""
    end = len(text)
    while end and not text[end - 1].isspace():
        end -= 1
    return text[:end]
