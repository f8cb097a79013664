"""What a judge is asked: both orders of every pair, put into words by a template."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, Prompt, as_messages
from mixpo.experiments.comparisons import Comparison

VARIABLES = ("prompt", "messages", "first", "second")
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class Judge:
    """A model and how it is asked."""

    model: str
    endpoint: str
    temperature: float | None
    reply_tokens: int | None
    """Of a reply, at most. None is not sent, like a temperature of None."""
    template: str
    """Digest of the template's text."""


@dataclass(frozen=True)
class Question:
    """A pair in one order, put to a judge."""

    judge: Judge
    text: str
    """The one message that is sent."""
    arms: tuple[str, str]
    """In the order in which their completions are shown."""
    seed: int
    number: int
    """The place of the prompt among the run's test prompts, from 0."""
    category: str | None

    @cached_property
    def id(self) -> str:
        """What a reply depends on, as a digest."""
        judge = self.judge
        return digest(judge.model, judge.endpoint, judge.temperature, judge.reply_tokens, self.text)


@dataclass(frozen=True)
class Template:
    """How a pair is put into words: Jinja2, with the variables prompt, messages, first and second."""

    name: str
    text: str

    def filled(self, prompt: Prompt, first: str, second: str) -> str:
        """The message. Raises `InputError` where the template cannot be filled."""
        messages = as_messages(prompt)
        values = {"prompt": _dialogue(messages), "messages": messages, "first": first, "second": second}
        try:
            return whole(_compiled(self.text).render(values))
        except Exception as error:  # a template is its author's code
            raise InputError(
                f"{self.name}: found a template that cannot be filled ({type(error).__name__}: {_line(error)}); "
                f"expected one of the variables {', '.join(VARIABLES)}"
            ) from error


def judges(
    models: Sequence[str], endpoint: str, temperature: float | None, reply_tokens: int | None, template: Template
) -> list[Judge]:
    """A judge a model. Raises `InputError` on a name that is empty, unprintable or there twice."""
    for place, name in enumerate(models):
        if not (name.isprintable() and name.strip()) or name in models[:place]:
            raise InputError(f"--model: found {name!r} empty, twice or unprintable; expected different names of models")
    return [Judge(name, endpoint, temperature, reply_tokens, digest(template.text)) for name in models]


def read_template(file: Path | None) -> Template:
    """A template, the paper's (appendix A.2) if no file is given. Raises `InputError` on one that shows no pair."""
    if file is None:
        return Template("paper.j2", (files("mixpo.judge") / "paper.j2").read_text(encoding="utf8"))
    try:
        text = file.read_text(encoding="utf8")
        named = find_undeclared_variables(_ENVIRONMENT.parse(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template: found no readable file {file} ({_line(error)})") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{file}:{error.lineno}: found {_line(error)}; expected a Jinja2 template") from error
    if lacking := [name for name in ("first", "second") if name not in named]:
        raise InputError(
            f"{file}: found no {{{{ {lacking[0]} }}}}; expected both completions; known are {', '.join(VARIABLES)}"
        )
    return Template(str(file), text)


def both_orders(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, pair: Comparison
) -> tuple[Question, ...]:
    """A pair as it stands and swapped; nothing to ask where both completions are the same."""
    if pair.same:
        return ()
    one, other = pair.completions
    shown = ((arms, one, other), (arms[::-1], other, one))
    return tuple(
        Question(judge, template.filled(pair.prompt, first, second), names, seed, pair.number, pair.category)
        for names, first, second in shown
    )


def digest(*parts: object) -> str:
    """Of texts, numbers and rows of them; half a surrogate pair is a character like others."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def whole(text: str) -> str:
    """The same text, with a replacement character for half a surrogate pair, which cannot be sent or printed."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def _dialogue(messages: Sequence[Message]) -> str:
    """A prompt's text; of several messages with who says what."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
