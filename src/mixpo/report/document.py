"""The report as data: sections with figures and tables, independent of HTML, Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from mixpo.data.rows import Message


@dataclass(frozen=True)
class Table:
    """A table of text: column headings, rows of cells in that order, and notes below."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @classmethod
    def from_row_dicts(cls, rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> "Table":
        """A table from one row or more as dicts of cells by heading; the first row's keys set the columns."""
        return cls(list(rows[0]), [list(row.values()) for row in rows], notes)


@dataclass(frozen=True)
class Figure:
    """An SVG figure, and the numbers it draws as columns and rows."""

    name: str
    """File name of its data: lower case, digits and hyphens, unique in the report."""
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    """One for each point; None where a value is missing."""


@dataclass(frozen=True)
class SectionGroup:
    """A part of a section, in this order: title, figures, table, notes."""

    title: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    key: Markup | None = None
    """Colour key that the figures share."""


@dataclass(frozen=True)
class Section:
    """A section of the report on one question: an opening text with the answer, then figures and tables."""

    id: str
    title: str
    opening: str
    groups: Sequence[SectionGroup] = ()


@dataclass(frozen=True)
class ArmCompletion:
    """An arm's completion of a test prompt, with its reward scores."""

    arm: str
    text: str
    scores: Mapping[str, float]
    """By name."""


@dataclass(frozen=True)
class PromptCompletions:
    """A test prompt, split into earlier turns and the last message, and every arm's completion of it."""

    number: int
    earlier_turns: Sequence[Message]
    last_message: str
    completions: Sequence[ArmCompletion]


@dataclass(frozen=True)
class Document:
    """The whole report as data: title, facts, sections, completions, failures and recipes."""

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
