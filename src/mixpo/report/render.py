"""The report as a self-contained HTML page and as Markdown."""

import csv
import html as entities
import io
import re
from collections.abc import Sequence
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from mixpo.report.comparison import format_number
from mixpo.report.document import Document, PromptCompletions, SectionGroup, Table

VISIBLE_ARMS = 6
"""Arms whose completions are visible at first."""
VISIBLE_PROMPTS = 20
"""Prompts that are open at first, that one click adds, and that are printed."""
MARKDOWN_ROWS = 12
"""Largest number of rows of a figure's data in Markdown."""
MARKDOWN_PROMPTS = 5
"""Prompts with completions in Markdown."""

INTERVAL = re.compile(r"([+\-−]?[\d.,]+%?) \[(\S+), (\S+)\](?: (.+))?", re.DOTALL)
"""A number with its bounds, and the text after them."""

Cell = str | float | int | None


def render_html(document: Document, *, mixpo_version: str, date: str) -> str:
    """The report as the text of one HTML page that needs no network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"slug": _make_slug, "text_columns": _flag_text_columns}
    environment.filters |= {"split": split_interval_columns, "number": format_number}
    environment.filters |= {"whole": _keep_intervals_together, "foldable": _allow_breaks_in_arm_name}
    arms = _list_arms_with_completions(document.prompts)
    one, other = _choose_shown_arms(document)
    completions = [completion for prompt in document.prompts for completion in prompt.completions]
    return environment.get_template("page.html.j2").render(
        document=document,
        facts=[*document.facts, ("mixpo", mixpo_version), ("date", date)],
        arms=arms,
        measures=list(dict.fromkeys(name for completion in completions for name in completion.scores)),
        one=one,
        other=other,
        shown=list(dict.fromkeys([*filter(None, (one, other)), *arms]))[:VISIBLE_ARMS],
        visible=VISIBLE_PROMPTS,
        make_csv_url=make_csv_url,
    )


def render_markdown(document: Document) -> str:
    """The report as Markdown text, with small figures as tables of their numbers and few completions."""
    facts = [f"- {_escape_markdown(name)}: {_escape_markdown(value)}" for name, value in document.facts]
    parts = [f"# {_escape_markdown(document.title)}", "\n".join(facts)]
    for section in document.sections:
        parts += [f"## {_escape_markdown(section.title)}", _escape_markdown(section.opening)]
        for group in section.groups:
            parts += _render_markdown_group(group)
    parts += ["## Completions", _escape_markdown(document.completions_opening)]
    pair = [arm for arm in _choose_shown_arms(document) if arm is not None]
    for prompt in document.prompts[:MARKDOWN_PROMPTS]:
        parts += _render_markdown_completions(prompt, pair)
    for title, blocks, language in (("Failed", document.failures, "text"), ("Reproduce", document.recipes, "yaml")):
        parts += [f"## {title}"] if blocks else []
        for name, text in blocks:
            parts += [f"{_escape_markdown(name)}:", _make_code_block(text, language)]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_csv(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as text of comma-separated values, with an empty cell for None."""
    file = io.StringIO()
    csv.writer(file).writerows([headings, *rows])
    return file.getvalue()


def make_csv_url(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A `data:` URL from which a table is downloaded as CSV."""
    return "data:text/csv;charset=utf-8," + quote(format_csv(headings, rows), safe=",;:()")


def split_interval_columns(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and rows with one number a cell: `0.10 [−0.12, 0.29] (p 0.03)` becomes four, with ASCII minus signs."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    parts = [column for heading, *cells in columns for column in _split_interval_column(heading, cells)]
    return [heading for heading, *_ in parts], [list(row) for row in zip(*(cells for _, *cells in parts), strict=True)]


def _split_interval_column(heading: str, cells: list[str]) -> list[list[str]]:
    """Columns of estimates, lower bounds, upper bounds and notes, each after its heading; one column without bounds."""
    cells = [re.sub(r"−(?=\d)", "-", cell) for cell in cells]
    matches = [INTERVAL.fullmatch(cell) for cell in cells]
    if not any(matches):
        return [[heading, *cells]]
    parts = [match.groups("") if match else (cell, "", "", "") for match, cell in zip(matches, cells, strict=True)]
    headings = [heading, f"{heading}, low", f"{heading}, high", f"{heading}, note"]
    columns = [[name, *values] for name, values in zip(headings, zip(*parts, strict=True), strict=True)]
    return columns if any(columns[-1][1:]) else columns[:-1]


def _keep_intervals_together(text: str) -> Markup:
    """A text as escaped HTML in which no line breaks within an interval and the p-value after it."""
    bounds = r"\[[^][,]{1,16}, [^][,]{1,16}\](?: \([^()]{1,16}\))?"
    return Markup(re.sub(bounds, r'<span class="whole">\g<0></span>', str(escape(text))))


def _allow_breaks_in_arm_name(text: str) -> Markup:
    """An arm's name as escaped HTML in which lines may break between the words of a setting and before its value."""
    return Markup(re.sub(r"(?<=\w)(?:[._](?=[a-z])|=)", r"\g<0><wbr>", str(escape(text))))


def _list_arms_with_completions(prompts: Sequence[PromptCompletions]) -> list[str]:
    return list(dict.fromkeys(completion.arm for prompt in prompts for completion in prompt.completions))


def _choose_shown_arms(document: Document) -> tuple[str | None, str | None]:
    """The two arms whose completions are compared first; None in place of a missing one."""
    arms = _list_arms_with_completions(document.prompts)
    if document.pair is not None and set(document.pair) <= set(arms):
        return document.pair
    one, other = [*arms, None, None][:2]
    return one, other


def _make_slug(text: str) -> str:
    """A text as a file name of lower case letters, digits and hyphens; `table` if nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"


def _flag_text_columns(table: Table) -> list[bool]:
    """For every column, True if it holds text: the first, and those without a cell that begins like a number."""
    number = re.compile(r"[+\-−~<>≤≥]?\s*[\d.]|[+\-−]?(nan|inf)$")
    return [
        i == 0 or not any(number.match(row[i]) for row in table.rows if i < len(row))
        for i in range(len(table.headings))
    ]


def _render_markdown_group(group: SectionGroup) -> list[str]:
    """Markdown blocks of a part of a section: title, figures as tables of their numbers if small, table, notes."""
    parts = [f"### {_escape_markdown(group.title)}"] if group.title else []
    for figure in group.figures:
        name = _escape_markdown(figure.name)
        if len(figure.rows) > MARKDOWN_ROWS:
            parts.append(f"(figure {name}, {len(figure.rows)} points: in the HTML report)")
        else:
            rows = [[_format_figure_value(cell) for cell in row] for row in figure.rows]
            parts += [f"Figure {name}:", _render_markdown_table(Table(figure.columns, rows))]
    notes = list(group.notes)
    if group.table is not None:
        parts.append(_render_markdown_table(group.table))
        notes = [*group.table.notes, *notes]
    return [*parts, *map(_escape_markdown, notes)]


def _render_markdown_table(table: Table) -> str:
    rule = ["---" if is_text else "---:" for is_text in _flag_text_columns(table)]
    rows = [[_escape_markdown(cell) for cell in row] for row in (table.headings, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _render_markdown_completions(prompt: PromptCompletions, arms: Sequence[str]) -> list[str]:
    """Markdown blocks of a prompt and of these arms' completions with their scores."""
    parts = [f"### Prompt {prompt.number}"]
    for turn in prompt.earlier_turns:
        parts += [f"{_escape_markdown(turn['role'])}:", _make_code_block(turn["content"])]
    parts.append(_make_code_block(prompt.last_message))
    for completion in prompt.completions:
        if completion.arm in arms:
            scores = [f"{_escape_markdown(name)} {format_number(value)}" for name, value in completion.scores.items()]
            line = " · ".join([_escape_markdown(completion.arm), *scores])
            parts += [f"{line}:", _make_code_block(completion.text)]
    return parts


def _format_figure_value(value: Cell) -> str:
    """A cell of a figure's data as text: a float with four digits, None as empty."""
    if value is None:
        return ""
    return format_number(value, ".4g") if isinstance(value, float) else str(value)


def _escape_markdown(text: str) -> str:
    """A text on one line, its Markdown and HTML characters escaped."""
    line = entities.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"[\\`*_|~$]|^\[|\](?=[(\[:])", r"\\\g<0>", line)
    return re.sub(r"^(\d*)([#+\-=.)])(?![\d.])", r"\1\\\2", line)


def _make_code_block(text: str, language: str = "text") -> str:
    """A fenced Markdown code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
