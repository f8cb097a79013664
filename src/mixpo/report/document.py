"""The report as data: sections with figures and tables, independent of HTML, Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from mixpo.data.rows import Message


@dataclass(frozen=True)
class Table:
    """A table of text cells, with notes below it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @classmethod
    def from_dicts(cls, rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> "Table":
        """A table of one row or more, each with its cells by heading, in the order of the first."""
        return cls(list(rows[0]), [list(row.values()) for row in rows], notes)


@dataclass(frozen=True)
class Figure:
    """An SVG figure and the numbers that it draws."""

    name: str
    """File name of its data: lower case, digits and hyphens, unique in the report."""
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    """One for each point; None where a value is missing."""


@dataclass(frozen=True)
class Group:
    """A part of a section: figures, a table below them, and notes below the table."""

    title: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    key: Markup | None = None
    """Colour key that the figures share."""


@dataclass(frozen=True)
class Section:
    """One question: a sentence with the answer, then figures and tables."""

    id: str
    title: str
    opening: str
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class ArmCompletion:
    """An arm's completion of a prompt, with its scores."""

    arm: str
    text: str
    scores: Mapping[str, float]
    """By name."""


@dataclass(frozen=True)
class PromptCompletions:
    """A test prompt and every arm's completion of it."""

    number: int
    earlier_turns: Sequence[Message]
    last_message: str
    completions: Sequence[ArmCompletion]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values at the head, such as ("seeds", "0, 1, 2")."""
    sections: Sequence[Section]
    completions_opening: str
    prompts: Sequence[PromptCompletions]
    pair: tuple[str, str] | None
    """The two arms whose completions are compared first."""
    failures: Sequence[tuple[str, str]]
    """What failed, and the reason."""
    recipes: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Every run's name and its recipe as YAML."""
