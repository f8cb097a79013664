"""A report as data: sections of figures and tables, before they become HTML, Markdown or JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table as text; its notes stand below it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A picture and the numbers that it was drawn from."""

    name: str
    """Of its files: lower case, digits and hyphens, unlike every other figure's of the report."""
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    """One a drawn point; None where a value is not there."""


@dataclass(frozen=True)
class Group:
    """What stands together in a section: figures above a table, and words below it."""

    title: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    key: Markup | None = None
    """Whose line has which colour, where the figures share that."""


@dataclass(frozen=True)
class Section:
    """One question: a sentence that answers it from its figures, then figures and tables."""

    id: str
    title: str
    opening: str
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class Turn:
    """A message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class ArmCompletion:
    """An arm's completion of a prompt."""

    arm: str
    text: str
    score: float
    true_reward: float | None = None
    second_score: float | None = None


@dataclass(frozen=True)
class Asked:
    """A test prompt and every arm's completion of it."""

    number: int
    earlier: Sequence[Turn]
    last: str
    completions: Sequence[ArmCompletion]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Such as ("seeds", "0, 1, 2"): what stands at the head."""
    sections: Sequence[Section]
    completions_opening: str
    asked: Sequence[Asked]
    pair: tuple[str, str] | None
    """The two arms that the completions are first compared for."""
    failed: Sequence[tuple[str, str]]
    """What failed, and why."""
    recipes: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Every run's name and its recipe as YAML."""
