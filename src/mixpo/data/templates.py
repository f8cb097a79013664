"""Chat templates: the text of a dialogue, what stands around an assistant's message, and templates that cannot serve.

A completion is what the template writes between its own generation prompt and the end of the turn. So the prompt that
is sampled from must be how the rendered dialogue begins; a template for which it is not is refused before training.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

from mixpo.data import template_trial
from mixpo.data.errors import InputError
from mixpo.data.rows import FIX, Message, RowError, excerpt
from mixpo.data.template_trial import OUT_OF_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

PROBE_SECONDS = 5
"""A template that computes for longer over a few short dialogues never ends."""
REMEDY = "set another as `model.chat_template`"
ASK = Message(role="user", content="What is new?")
ANSWER = Message(role="assistant", content="Nothing is.")
LONGER = [[*first, ASK, ANSWER, ASK] for first in ([], [Message(role="system", content="Be brief.")])]
"""Dialogues whose assistant's message is not the last, without and with a system message."""


@dataclass(frozen=True)
class TurnFormat:
    """What a chat template writes around an assistant's last message."""

    prompt: str
    """A prompt, as it is before the completion."""
    lead: str
    """Between the generation prompt and the content."""
    after: str
    """Behind the content."""
    dialogues: tuple[str, ...]
    """Dialogues that hold what the template writes around messages of every kind."""
    warnings: tuple[str, ...]


def render_dialogue(tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool) -> str:
    """The text of a dialogue by the chat template; a prompt ends with the generation prompt.

    Raises `RowError` on messages that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the prompts are lists of messages, but the tokenizer has no chat template; "
            "set `model.chat_template` to a Jinja template, or use prompts that are plain strings"
        )
    try:
        return _apply(tokenizer, messages, prompt=prompt)
    except Exception as error:  # a template is a program, and raises what it likes
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise RowError("prompt", f"is refused by the tokenizer's chat template ({problem}); {FIX}") from error


def read_turn_format(tokenizer: Tokenizer) -> TurnFormat:
    """What the chat template writes around an assistant's message, by rendering a short dialogue.

    Raises `InputError` if completions could not be trained and sampled by this template.
    """
    name = f"{tokenizer.name_or_path}: the chat template"
    try:
        _check_that_it_ends(tokenizer)
        prompt = _apply(tokenizer, [ASK], prompt=True)
        bare = _apply(tokenizer, [ASK], prompt=False)
        whole = _apply(tokenizer, [ASK, ANSWER], prompt=False)
        dialogues = tuple(_longer_dialogues(tokenizer)) or (whole,)
        reads_clock = _reads_clock(tokenizer)
    except Exception as error:
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"{name} fails on a dialogue of a user's and an assistant's message ({type(error).__name__}: {problem}); "
            f"expected a template that renders it; {REMEDY}"
        ) from error
    for kind, text, message in (("an assistant's", whole, ANSWER), ("a user's", prompt, ASK)):
        if message["content"] not in text:
            raise InputError(
                f"{name} does not print {kind} message; expected a template of the messages' roles and contents; "
                f"{REMEDY}"
            )
    before, _, after = whole.rpartition(ANSWER["content"])
    if not before.startswith(prompt):
        raise InputError(
            f"{name} ends a prompt with {_ending(prompt, before)}, which a rendered dialogue does not have before the "
            f"assistant's message: completions would be trained inside it; {_advice(tokenizer)}"
        )
    lead = before[len(prompt) :]
    if lead.strip() and prompt == bare:
        raise InputError(
            f"{name} ignores add_generation_prompt: the assistant's message comes after {lead!r}, which no prompt "
            f"ends with; expected it at the end of a prompt; {REMEDY}"
        )
    warnings = []
    if lead.strip():
        warnings.append(
            f"{name} writes {lead!r} before an assistant's message, which is trained on as a part of every completion; "
            f"to have it in the prompt {_advice(tokenizer)}"
        )
    if reads_clock:
        warnings.append(
            f"{name} writes the date, so that prompts have other tokens on another day; fix it, in most templates "
            "with model.template_arguments={date_string: '1 Jan 2026'}"
        )
    return TurnFormat(prompt, lead, after, dialogues, tuple(warnings))


def write_arguments_into_template(tokenizer: Tokenizer, arguments: Mapping[str, bool | int | float | str]) -> str:
    """A tokenizer's chat template that begins by setting its own arguments, so that whoever renders it has them.

    Raises `InputError` on an argument that the template does not read.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"model.template_arguments: found {', '.join(arguments)}, but the tokenizer has no chat template; set one "
            "as `model.chat_template`"
        )
    template = tokenizer.get_chat_template()
    for name in arguments:
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise InputError(
                f"model.template_arguments: found {name!r}, which the chat template does not read; expected names of "
                f"its variables{_listed(_switches(template))}"
            )
    lines = [f"{{%- set {name} = {_literal(value)} %}}" for name, value in arguments.items()]
    return "".join([*lines, "\n" if lines and template.startswith("\n") else "", template])  # trim_blocks takes one


def _literal(value: bool | int | float | str) -> str:
    if not isinstance(value, str):
        return repr(value).lower()
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool, **arguments: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **arguments))


def _longer_dialogues(tokenizer: Tokenizer) -> Iterator[str]:
    """The longer dialogues as far as the template takes them.

    What a template writes around the last answer alone, such as an empty thinking block, is not in it.
    """
    for messages in LONGER:
        try:
            yield _apply(tokenizer, messages, prompt=False)
        except Exception:  # a template is a program; what it does with these messages does not matter
            continue


def _reads_clock(tokenizer: Tokenizer) -> bool:
    """Whether a prompt depends on the time: the template fails without its clock."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    try:
        _apply(tokenizer, [ASK], prompt=True, strftime_now="no clock")
    except TypeError:
        return True
    return False


def _check_that_it_ends(tokenizer: Tokenizer) -> None:
    """Render the short dialogues in a process of its own. Raises `TimeoutError` or `MemoryError` where it is ended."""
    job = {
        "template": tokenizer.get_chat_template(),
        "variables": tokenizer.special_tokens_map,
        "dialogues": [
            {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
            for messages, prompt in (
                ([ASK], True),
                ([ASK], False),
                ([ASK, ANSWER], False),
                *((m, False) for m in LONGER),
            )
        ],
        "seconds": PROBE_SECONDS,
    }
    code = _try_template(json.dumps(job, default=str))
    if code < 0:
        raise TimeoutError("it does not end")
    if code == OUT_OF_MEMORY:
        raise MemoryError("it takes more than 1 GiB")


@lru_cache
def _try_template(job: str) -> int:
    """Exit code of `template_trial.py`."""
    words = [sys.executable, "-P", template_trial.__file__]
    return subprocess.run(words, input=job, text=True, stdout=DEVNULL, stderr=DEVNULL, check=False).returncode


def _ending(prompt: str, before: str) -> str:
    """What the prompt has and the dialogue has not."""
    common = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), len(before))
    return excerpt(prompt[common:])


def _switches(template: str) -> list[str]:
    """Variables of a template that switch thinking on or off, as the well-known ones are called."""
    return sorted(set(re.findall(r"\b(?:enable_)?thinking\b", template)))


def _listed(names: Sequence[str]) -> str:
    return f", such as {', '.join(names)}" if names else ""


def _advice(tokenizer: Tokenizer) -> str:
    names = _switches(str(tokenizer.chat_template))
    return f"set model.template_arguments={{{names[0]}: false}} or {REMEDY}" if names else REMEDY
