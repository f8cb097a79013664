"""Questions for a judge: both orders of every pair of completions, rendered by a template."""

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
from mixpo.data.rows import Message, Prompt, convert_to_messages
from mixpo.experiments.comparisons import Comparison

VARIABLES = ("prompt", "messages", "first", "second")
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class Judge:
    """A language model as judge: model name, endpoint, sampling settings and digest of the template."""

    model: str
    endpoint: str
    temperature: float | None
    reply_tokens: int | None
    """Limit of a reply's tokens. None is not sent, like a temperature of None."""
    template: str
    """Digest of the template's text."""


@dataclass(frozen=True)
class JudgeQuestion:
    """A pair of completions in one order, as a message to a judge."""

    judge: Judge
    text: str
    """The one message that is sent."""
    arms: tuple[str, str]
    """The arms in the order in which their completions are shown."""
    seed: int
    number: int
    """Index of the prompt among the run's test prompts, from 0."""
    category: str | None

    @cached_property
    def id(self) -> str:
        """Digest of everything that the reply depends on."""
        judge = self.judge
        return compute_digest(judge.model, judge.endpoint, judge.temperature, judge.reply_tokens, self.text)


@dataclass(frozen=True)
class Template:
    """Jinja2 template of a question, with the variables prompt, messages, first and second."""

    name: str
    text: str

    def render_message(self, prompt: Prompt, first: str, second: str) -> str:
        """Render the message for a prompt and two completions. Raises `InputError` where rendering fails."""
        messages = convert_to_messages(prompt)
        values = {"prompt": _format_messages(messages), "messages": messages, "first": first, "second": second}
        try:
            return replace_surrogates(_compile_template(self.text).render(values))
        except Exception as error:  # a template is its author's code
            raise InputError(
                f"{self.name}: found an invalid template ({type(error).__name__}: {_format_error(error)}); "
                f"expected one of the variables {', '.join(VARIABLES)}"
            ) from error


def make_judges(
    models: Sequence[str], endpoint: str, temperature: float | None, reply_tokens: int | None, template: Template
) -> list[Judge]:
    """List a judge for each model. Raises `InputError` on an empty, unprintable or repeated name."""
    for index, name in enumerate(models):
        if not (name.isprintable() and name.strip()) or name in models[:index]:
            raise InputError(f"--model: found {name!r}, empty, repeated or unprintable; expected different model names")
    return [Judge(name, endpoint, temperature, reply_tokens, compute_digest(template.text)) for name in models]


def read_template(file: Path | None) -> Template:
    """Read the template of questions from a file, or the paper's (appendix A.2) if None.

    Raises `InputError` on one that does not show both completions.
    """
    if file is None:
        return Template("paper.j2", (files("mixpo.judge") / "paper.j2").read_text(encoding="utf8"))
    try:
        text = file.read_text(encoding="utf8")
        variables = find_undeclared_variables(_ENVIRONMENT.parse(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template: found no readable file {file} ({_format_error(error)})") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{file}:{error.lineno}: found {_format_error(error)}; expected a Jinja2 template") from error
    if missing := [name for name in ("first", "second") if name not in variables]:
        raise InputError(
            f"{file}: found no {{{{ {missing[0]} }}}}; expected both completions; known are {', '.join(VARIABLES)}"
        )
    return Template(str(file), text)


def make_question_pair(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, pair: Comparison
) -> tuple[JudgeQuestion, ...]:
    """Return a pair's questions to a judge, one for each order of completions; none if these are identical."""
    if pair.is_identical:
        return ()
    questions = []
    for shown_arms, completions in ((arms, pair.completions), (arms[::-1], pair.completions[::-1])):
        text = template.render_message(pair.prompt, *completions)
        questions.append(JudgeQuestion(judge, text, shown_arms, seed, pair.number, pair.category))
    return tuple(questions)


def compute_digest(*parts: object) -> str:
    """Return the SHA-256 of nested texts and numbers, as 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def replace_surrogates(text: str) -> str:
    """Return a text with half surrogate pairs, which cannot be sent, replaced by the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache
def _compile_template(template_text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template_text)


def _format_messages(messages: Sequence[Message]) -> str:
    """Format the messages of a prompt as one text, with their roles if there are several."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _format_error(error: Exception) -> str:
    """Format the message of an error on one line."""
    return " ".join(str(error).split())
