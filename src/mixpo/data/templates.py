"""Chat templates: rendering dialogues, inferring the format of an assistant's turn, and rejecting unusable templates.

A completion is the text between the template's generation prompt and the end of the turn. The prompt that is sampled
from must therefore be a prefix of the rendered dialogue; a template that violates this is rejected before training.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

from mixpo.data import template_sandbox
from mixpo.data.errors import InputError, extract_first_line
from mixpo.data.rows import FIX_HINT, Message, RowError, make_excerpt
from mixpo.data.template_sandbox import OUT_OF_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

RENDER_SECONDS = 5
"""CPU time limit for rendering the probe dialogues."""
CHAT_TEMPLATE_HINT = "set another as `model.chat_template`"
USER_MESSAGE = Message(role="user", content="What is new?")
ASSISTANT_MESSAGE = Message(role="assistant", content="Nothing is.")
PROBE_DIALOGUES = [
    [*system, USER_MESSAGE, ASSISTANT_MESSAGE, USER_MESSAGE]
    for system in ([], [Message(role="system", content="Be brief.")])
]
"""Dialogues with an assistant's message before the last one, without and with a system message."""


@dataclass(frozen=True)
class AssistantTurnFormat:
    """Text that a chat template writes around an assistant's last message, and warnings about the template."""

    prompt: str
    """A rendered one-message prompt with its generation prompt."""
    prefix: str
    """Text between the generation prompt and the message's content."""
    suffix: str
    """Text after the message's content."""
    dialogues: tuple[str, ...]
    """Rendered dialogues with messages of every role."""
    warnings: tuple[str, ...]


def render_dialogue(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Render messages to text by the chat template. Raises `RowError` if refused, `InputError` without template."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the prompts are lists of messages, but the tokenizer has no chat template; "
            "set `model.chat_template` to a Jinja template, or use prompts that are plain strings"
        )
    try:
        return _apply_template(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program, and raises what it likes
        raise RowError(
            "prompt", f"is refused by the tokenizer's chat template ({extract_first_line(error)}); {FIX_HINT}"
        ) from error


def infer_assistant_turn_format(tokenizer: Tokenizer) -> AssistantTurnFormat:
    """Infer what a chat template writes around an assistant's message. Raises `InputError` if it is unusable."""
    name = f"{tokenizer.name_or_path}: the chat template"
    try:
        _check_rendering_terminates(tokenizer)
        prompt = _apply_template(tokenizer, [USER_MESSAGE], add_generation_prompt=True)
        without_generation_prompt = _apply_template(tokenizer, [USER_MESSAGE], add_generation_prompt=False)
        dialogue = _apply_template(tokenizer, [USER_MESSAGE, ASSISTANT_MESSAGE], add_generation_prompt=False)
        dialogues = tuple(_render_probe_dialogues(tokenizer)) or (dialogue,)
        depends_on_date = _depends_on_date(tokenizer)
    except Exception as error:
        raise InputError(
            f"{name} fails on a dialogue of a user's and an assistant's message ({type(error).__name__}: "
            f"{extract_first_line(error)}); expected a template that renders it; {CHAT_TEMPLATE_HINT}"
        ) from error
    for kind, text, message in (("an assistant's", dialogue, ASSISTANT_MESSAGE), ("a user's", prompt, USER_MESSAGE)):
        if message["content"] not in text:
            raise InputError(
                f"{name} does not write {kind} message; expected a template that writes the content of every message; "
                f"{CHAT_TEMPLATE_HINT}"
            )
    before, _, suffix = dialogue.rpartition(ASSISTANT_MESSAGE["content"])
    if not before.startswith(prompt):
        raise InputError(
            f"{name} ends a prompt with {_quote_first_difference(prompt, before)}, which a rendered dialogue does not "
            "have before the assistant's message, so completions would be trained at the wrong position; "
            f"{_suggest_template_fix(tokenizer)}"
        )
    prefix = before[len(prompt) :]
    if prefix.strip() and prompt == without_generation_prompt:
        raise InputError(
            f"{name} ignores add_generation_prompt: the assistant's message comes after {prefix!r}, which no prompt "
            f"ends with; expected it at the end of a prompt; {CHAT_TEMPLATE_HINT}"
        )
    warnings = []
    if prefix.strip():
        warnings.append(
            f"{name} writes {prefix!r} before an assistant's message, and every completion is trained with it; to move "
            f"it into the prompt {_suggest_template_fix(tokenizer)}"
        )
    if depends_on_date:
        warnings.append(
            f"{name} writes the current date, so prompts change from day to day; fix the date, in most templates with "
            "model.template_arguments={date_string: '1 Jan 2026'}"
        )
    return AssistantTurnFormat(prompt, prefix, suffix, dialogues, tuple(warnings))


def prepend_template_arguments(tokenizer: Tokenizer, arguments: Mapping[str, bool | int | float | str]) -> str:
    """The chat template as text, arguments assigned at its start. Raises `InputError` on one that it does not use."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"model.template_arguments: found {', '.join(arguments)}, but the tokenizer has no chat template; set one "
            "as `model.chat_template`"
        )
    template = tokenizer.get_chat_template()
    examples = ", ".join(_find_thinking_variables(template))
    for name in arguments:
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise InputError(
                f"model.template_arguments: found {name!r}, which the chat template does not use; expected names of "
                "its variables" + (f", such as {examples}" if examples else "")
            )
    lines = [f"{{%- set {name} = {_format_jinja_literal(value)} %}}" for name, value in arguments.items()]
    return "".join([*lines, "\n" if lines and template.startswith("\n") else "", template])  # trim_blocks takes one


def _format_jinja_literal(value: bool | int | float | str) -> str:
    """A value as a literal of a Jinja template: true, 1, 'text'."""
    if not isinstance(value, str):
        return repr(value).lower()
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _apply_template(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool, **arguments: Any
) -> str:
    """Text of the messages as rendered by the chat template. Raises whatever the template raises."""
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
    )


def _render_probe_dialogues(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the rendered probe dialogues, leaving out those that the template rejects."""
    for messages in PROBE_DIALOGUES:
        with suppress(Exception):  # a template is a program; what it does with these messages does not matter
            yield _apply_template(tokenizer, messages, add_generation_prompt=False)


def _depends_on_date(tokenizer: Tokenizer) -> bool:
    """True if the chat template asks for the date (`strftime_now`) when it renders a prompt."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    try:
        _apply_template(tokenizer, [USER_MESSAGE], add_generation_prompt=True, strftime_now="no clock")
    except TypeError:
        return True
    return False


def _check_rendering_terminates(tokenizer: Tokenizer) -> None:
    """Render the probe dialogues in a subprocess. Raises `TimeoutError` or `MemoryError` if it exceeds a limit."""
    job = {
        "template": tokenizer.get_chat_template(),
        "variables": tokenizer.special_tokens_map,
        "dialogues": [
            {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
            for messages, prompt in (
                ([USER_MESSAGE], True),
                ([USER_MESSAGE], False),
                ([USER_MESSAGE, ASSISTANT_MESSAGE], False),
                *((m, False) for m in PROBE_DIALOGUES),
            )
        ],
        "seconds": RENDER_SECONDS,
    }
    code = _run_sandbox(json.dumps(job, default=str))
    if code < 0:
        raise TimeoutError(f"it renders for more than {RENDER_SECONDS} s of CPU time")
    if code == OUT_OF_MEMORY:
        raise MemoryError("it uses more than 1 GiB")


@lru_cache
def _run_sandbox(job_json: str) -> int:
    """Run `template_sandbox.py` on a job in JSON and return its exit code, cached by the job."""
    command = [sys.executable, "-P", template_sandbox.__file__]
    return subprocess.run(command, input=job_json, text=True, stdout=DEVNULL, stderr=DEVNULL, check=False).returncode


def _quote_first_difference(rendered_prompt: str, rendered_dialogue: str) -> str:
    """Quoted excerpt of the prompt from the first character that differs from the rendered dialogue."""
    common = next(
        (i for i, (a, b) in enumerate(zip(rendered_prompt, rendered_dialogue, strict=False)) if a != b),
        len(rendered_dialogue),
    )
    return make_excerpt(rendered_prompt[common:])


def _find_thinking_variables(template: str) -> list[str]:
    """Which of the variables `thinking` and `enable_thinking` a template contains, as a sorted list."""
    return sorted(set(re.findall(r"\b(?:enable_)?thinking\b", template)))


def _suggest_template_fix(tokenizer: Tokenizer) -> str:
    """Advice, as text, for an unusable template: an argument that switches thinking off, or another template."""
    names = _find_thinking_variables(str(tokenizer.chat_template))
    return (
        f"set model.template_arguments={{{names[0]}: false}} or {CHAT_TEMPLATE_HINT}" if names else CHAT_TEMPLATE_HINT
    )
