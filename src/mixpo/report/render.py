"""A report as text: one HTML page that needs no network, and Markdown."""

import csv
import html as entities
import io
import re
from collections.abc import Sequence
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from mixpo.report.document import ArmCompletion, Asked, Document, Figure, Group, Section, Table

SHOWN_ARMS = 6
"""Arms whose completions the page shows first."""
PRINTED_PROMPTS = 20
"""Prompts that stand on paper."""
MARKDOWN_ROWS = 12
"""Rows of a figure's data that Markdown still holds."""
MARKDOWN_PROMPTS = 5
"""Prompts whose completions Markdown holds."""

INTERVAL = re.compile(r"([+\-−]?[\d.,]+%?) \[(\S+), (\S+)\](?: (.+))?", re.DOTALL)
"""A number with its bounds, and what stands behind."""

Cell = str | float | int | None


def html(document: Document, *, mixpo: str, date: str) -> str:
    """The report as one self-contained page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"slug": _slug, "wordy": _wordy, "scores": _scores, "split": split}
    environment.filters |= {"whole": _whole, "foldable": _foldable}
    arms = _arms(document.asked)
    one, other = _pair(document)
    shown = list(dict.fromkeys([*filter(None, (one, other)), *arms]))[:SHOWN_ARMS]
    return environment.get_template("page.html.j2").render(
        document=document,
        facts=[*document.facts, ("mixpo", mixpo), ("date", date)],
        contents=_contents(document),
        arms=arms,
        measures=list(
            dict.fromkeys(name for one in document.asked for shown in one.completions for name, _ in _scores(shown))
        ),
        one=one,
        other=other,
        shown=shown,
        printed=PRINTED_PROMPTS,
        csv_address=csv_address,
    )


def markdown(document: Document) -> str:
    """The report without its larger figures and most of its completions."""
    facts = [f"- {_words(name)}: {_words(value)}" for name, value in document.facts]
    parts = [f"# {_words(document.title)}", "\n".join(facts)]
    for section in document.sections:
        parts += _markdown_section(section)
    parts += ["## Completions", _words(document.completions_opening)]
    pair = [arm for arm in _pair(document) if arm is not None]
    for asked in document.asked[:MARKDOWN_PROMPTS]:
        parts += _markdown_asked(asked, pair)
    if document.failed:
        parts.append("## Failed")
        for what, why in document.failed:
            parts += [f"{_words(what)}:", _fenced(why)]
    if document.recipes:
        parts.append("## Reproduce")
        for name, recipe in document.recipes:
            parts += [f"{_words(name)}:", _fenced(recipe, "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as comma-separated values; an empty cell where a value is None."""
    file = io.StringIO()
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue()


def csv_address(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as the address of a download."""
    return "data:text/csv;charset=utf-8," + quote(csv_text(columns, rows), safe=",;:()")


def split(table: Table) -> tuple[list[str], list[list[str]]]:
    """A table whose cells hold one number each: `0.10 [-0.12, 0.29] (p 0.03)` becomes four columns."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    found = [column for heading, *cells in columns for column in _split(heading, cells)]
    return [heading for heading, *_ in found], [list(row) for row in zip(*(cells for _, *cells in found), strict=True)]


def _split(heading: str, cells: list[str]) -> list[list[str]]:
    """The columns of a column's estimates, bounds and what stands behind them; itself where no cell has bounds."""
    found = [INTERVAL.fullmatch(cell) for cell in cells]
    if not any(found):
        return [[heading, *cells]]
    parts = [one.groups("") if one else (cell, "", "", "") for one, cell in zip(found, cells, strict=True)]
    headings = [heading, f"{heading}, low", f"{heading}, high", f"{heading}, note"]
    columns = [[name, *own] for name, own in zip(headings, zip(*parts, strict=True), strict=True)]
    return columns if any(columns[-1][1:]) else columns[:-1]


def _whole(text: str) -> Markup:
    """Text in which no line breaks within a number's bounds, nor before the few words behind them."""
    bounds = r"\[[^][,]{1,16}, [^][,]{1,16}\](?: \([^()]{1,16}\))?"
    return Markup(re.sub(bounds, r'<span class="whole">\g<0></span>', str(escape(text))))


def _foldable(text: str) -> Markup:
    """An arm's name that may break before the words of a setting and before its value."""
    return Markup(re.sub(r"(?<=\w)(?:[._](?=[a-z])|=)", r"\g<0><wbr>", str(escape(text))))


def _arms(asked: Sequence[Asked]) -> list[str]:
    return list(dict.fromkeys(shown.arm for one in asked for shown in one.completions))


def _pair(document: Document) -> tuple[str | None, str | None]:
    """The two arms that completions are first compared for, as far as there are completions of them."""
    arms = _arms(document.asked)
    if document.pair is not None and set(document.pair) <= set(arms):
        return document.pair
    one, other = [*arms, None, None][:2]
    return one, other


def _contents(document: Document) -> list[tuple[str, str]]:
    entries = [(section.id, section.title) for section in document.sections]
    entries.append(("completions", "Completions"))
    if document.failed:
        entries.append(("failed", "Failed"))
    if document.recipes:
        entries.append(("reproduce", "Reproduce"))
    return entries


def _slug(text: str) -> str:
    """A file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"


def _wordy(table: Table) -> list[bool]:
    """Which columns hold words, not numbers: after the first, those without a cell that begins as a number does."""
    number = re.compile(r"[+\-−~<>≤≥]?\s*[\d.]|[+\-−]?(nan|inf)$")
    return [
        place == 0 or not any(number.match(row[place]) for row in table.rows if place < len(row))
        for place in range(len(table.headings))
    ]


def _markdown_section(section: Section) -> list[str]:
    parts = [f"## {_words(section.title)}", _words(section.opening)]
    for group in section.groups:
        parts += _markdown_group(group)
    return parts


def _markdown_group(group: Group) -> list[str]:
    parts = [f"### {_words(group.title)}"] if group.title else []
    for figure in group.figures:
        parts += _markdown_figure(figure)
    notes = list(group.notes)
    if group.table is not None:
        parts.append(_markdown_table(group.table))
        notes = [*group.table.notes, *notes]
    return [*parts, *map(_words, notes)]


def _markdown_figure(figure: Figure) -> list[str]:
    if len(figure.rows) > MARKDOWN_ROWS:
        return [f"(figure {_words(figure.name)}, {len(figure.rows)} points: in the HTML report)"]
    rows = [[_cell(cell) for cell in row] for row in figure.rows]
    return [f"Figure {_words(figure.name)}:", _markdown_table(Table(figure.columns, rows))]


def _markdown_table(table: Table) -> str:
    rule = ["---" if wordy else "---:" for wordy in _wordy(table)]
    rows = [[_words(cell) for cell in row] for row in (table.headings, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _markdown_asked(asked: Asked, arms: Sequence[str]) -> list[str]:
    parts = [f"### Prompt {asked.number}"]
    for turn in asked.earlier:
        parts += [f"{_words(turn.role)}:", _fenced(turn.content)]
    parts.append(_fenced(asked.last))
    for shown in asked.completions:
        if shown.arm in arms:
            scores = " · ".join(f"{_words(name)} {value:.2f}" for name, value in _scores(shown))
            parts += [f"{_words(shown.arm)} · {scores}:", _fenced(shown.text)]
    return parts


def _scores(shown: ArmCompletion) -> list[tuple[str, float]]:
    """What a completion was given, by name."""
    named = [("score", shown.score), ("r*", shown.true_reward), ("second score", shown.second_score)]
    return [(name, value) for name, value in named if value is not None]


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _words(text: str) -> str:
    """A line of Markdown that reads as the text, whatever stands in it."""
    line = entities.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"[\\`*_|~$]|^\[|\](?=[(\[:])", r"\\\g<0>", line)
    return re.sub(r"^(\d*)([#+\-=.)])(?![\d.])", r"\1\\\2", line)


def _fenced(text: str, language: str = "text") -> str:
    """A block of Markdown in which nothing is active: its fence is longer than any within."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
