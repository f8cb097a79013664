"""What a run looks like in a terminal: progress bars, or plain lines in a pipe; then the table."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from mixpo.experiments.plan import Planned
from mixpo.experiments.results import Results, list_first
from mixpo.experiments.run import Display
from mixpo.experiments.workers import Failure, Outcome
from mixpo.report import document as report
from mixpo.report.arms import main_table
from mixpo.stages.engine import read_summary
from mixpo.stages.rows import read_table

SHOWN = ("loss", "accuracy", "score", "kl", "end_rate", "sampled_end_rate")
OPTIONAL = ("tokens", "end rate", "win/tie/lose", "sd of")
"""How the headings of columns begin that a narrow terminal does without, in this order."""
NAME_WIDTH = 24
"""Characters of a word of an arm's name that are not folded, but where nothing else is left to give way."""
PLAIN_SECONDS = 10.0
"""Time between two plain lines of one stage."""


class Plain:
    """A line when a stage begins, every few seconds, and when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, stage: str, identity: str, arms: Sequence[str]) -> "Line":
        """A stage starts to compute."""
        return Line(self.console, f"{stage} {identity}", arms)

    def note(self, text: str) -> None:
        """A line worth reading now."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Line:
    """One stage, a line at a time."""

    def __init__(self, console: Console, name: str, arms: Sequence[str]) -> None:
        self.console, self.name = console, name
        self.printed = time.monotonic()
        self.note(f"begins (for {list_first(arms)})")

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Some steps are over."""
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            self.note(f"{done}/{total} {_brief(metrics)}".rstrip())

    def note(self, text: str) -> None:
        """A line worth reading now."""
        self.console.print(f"{self.name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self, outcome: Outcome) -> None:
        """The stage is over."""
        self.note(_ended(self.name, outcome))


class Bars:
    """A progress bar for every stage that computes."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def begin(self, stage: str, identity: str, arms: Sequence[str]) -> "Bar":
        """A stage starts to compute."""
        return Bar(self.progress, f"{stage} {identity}", arms)

    def note(self, text: str) -> None:
        """A line worth reading now."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bar:
    """One stage as a progress bar."""

    def __init__(self, progress: Progress, name: str, arms: Sequence[str]) -> None:
        self.progress, self.name = progress, name
        self.task = progress.add_task(name, total=None, metrics=f"for {list_first(arms)}")

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Some steps are over."""
        self.progress.update(self.task, completed=done, total=total, metrics=_brief(metrics))

    def note(self, text: str) -> None:
        """A line worth reading now."""
        self.progress.console.print(f"{self.name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self, outcome: Outcome) -> None:
        """The stage is over: its bar goes, a line stays."""
        self.progress.remove_task(self.task)
        self.note(_ended(self.name, outcome))


def _ended(name: str, outcome: Outcome) -> str:
    if isinstance(outcome, Failure):
        return f"failed: {outcome.reason.removeprefix(f'{name}: ')}"
    return f"done in {outcome:.1f} s"


@contextmanager
def watch(*, plain: bool) -> Iterator[Display]:
    """Bars in a terminal, plain lines in a pipe or if asked for."""
    console = Console()
    try:
        with _display(console, plain=plain or not console.is_terminal) as display:
            yield display
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on where this one was")
        raise


@contextmanager
def _display(console: Console, *, plain: bool) -> Iterator[Display]:
    if plain:
        yield Plain(console)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[metrics]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Bars(progress)


def _brief(metrics: Mapping[str, float]) -> str:
    """The speed, then what there is of `SHOWN`; PPO's loss is about 0 whatever happens, so it is left out."""
    shown = []
    if metrics.get("seconds") and metrics.get("tokens"):
        shown.append(f"{metrics['tokens'] / metrics['seconds']:.0f} tokens/s")
    names = [name for name in SHOWN if name in metrics and (name != "loss" or "kl" not in metrics)]
    return "  ".join([*shown, *(f"{name} {metrics[name]:.3g}" for name in names)])


def show_table(results: Results) -> None:
    """The main table, without the less important columns where the terminal is narrow."""
    console = Console()
    table = main_table(results, paper=False)
    optional = [heading for part in OPTIONAL for heading in table.headings if heading.startswith(part)]
    tries = [([], True), *((optional[:count], False) for count in range(len(optional) + 1))]
    for left_out, beside, name_width in [*((*one, NAME_WIDTH) for one in tries), (optional, False, NAME_WIDTH // 3)]:
        shown = _table(results, table, left_out, beside=beside, name_width=name_width)
        if Measurement.get(console, console.options.update_width(1000), shown).minimum <= console.width:
            break
    console.print(shown)
    if left_out:
        named = f"Left out at this width: {', '.join(left_out)}; a wider terminal or `mixpo report` shows them."
        console.print(named, markup=False, highlight=False, soft_wrap=True)
    for line in table.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(results: Results, table: report.Table, left_out: Sequence[str], *, beside: bool, name_width: int) -> Table:
    """Some columns, their intervals beside the means or below them; only the arms' names are folded."""
    title = f"{results.title}: means with 95% intervals"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    kept = [place for place, heading in enumerate(table.headings) if heading not in left_out]
    rows = [[Text(row[place] if beside else row[place].replace(" [", "\n[")) for place in kept] for row in table.rows]
    for place, heading in enumerate(table.headings[place] for place in kept):
        words = [word for row in rows for word in row[place].plain.split("\n" if place else None)]
        width = max(map(cell_len, [*heading.split(), *words]))
        if place == 0:
            shown.add_column(heading, overflow="fold", min_width=min(width, name_width))
        else:
            shown.add_column(heading, justify="right", width=width)
    for row in rows:
        shown.add_row(*row)
    return shown


def show(table: report.Table, title: str) -> None:
    """A table of a report and its notes; on its side, a column a row, where the terminal is too narrow for it."""
    console = Console()
    lines = [table.headings, *table.rows]
    parts = [_lines(title, lines)]
    if Measurement.get(console, console.options.update_width(10_000), parts[0]).maximum > console.width:
        first, *others = (max(map(cell_len, line)) for line in lines)
        beside = max(1, (console.width - first) // (max(others, default=0) + 3))
        starts = range(1, len(lines), beside)
        parts = [_lines(title, list(zip(lines[0], *lines[at : at + beside], strict=True))) for at in starts]
    for part in parts:
        console.print(part)
    for note in table.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _lines(title: str, lines: Sequence[Sequence[str]]) -> Table:
    headings, *rows = lines
    shown = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        shown.add_column(Text(heading), justify="right" if place else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def show_results(results: Results, page: Path, *, computed: int | None = None, found: int | None = None) -> None:
    """The main table, the report's path and the aligned models' paths."""
    console = Console()
    show_table(results)
    if computed is not None:
        console.print(f"{computed} stages computed, {found} found in the cache", highlight=False)
    aligned = "mpo" if "mpo" in results.names else results.names[-1]
    for arm in results.of(aligned):
        if arm.model:
            console.print(f"model ({arm.arm}, seed {arm.seed}): {arm.model}", highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def show_plan(planned: list[tuple[str, list[Planned]]]) -> None:
    """A tree an arm."""
    console = Console()
    for heading, lines in planned:
        root = Tree(Text(heading, style="bold"))
        branches = [root]
        for line in lines:
            name = f"{line.field}: {line.kind}" if line.field else line.kind
            state = "cached" if line.done else line.why
            text = Text.assemble(
                name,
                " ",
                (line.identity, "cyan"),
                "  ",
                (state, "green" if line.done else "yellow"),
                ("  (above)" if line.shown_before else "", "dim"),
            )
            del branches[line.depth + 1 :]
            branches.append(branches[line.depth].add(text))
        console.print(root)


def show_selection(folder: Path) -> None:
    """Sizes, gap histogram and samples from both ends of a selection."""
    console = Console()
    summary = read_summary(folder)
    both = [row for part in ("easy", "hard") for row in read_table(folder / f"{part}.parquet")]
    rows = sorted(both, key=lambda row: float(row["gap"]))
    identical = sum(row["tokens"][0] == row["tokens"][1] for row in rows)
    spread = float(np.std([row["scores"] for row in rows]))
    console.print(
        f"{summary['pairs']} pairs: {summary['easy']} easy (gap > {summary['threshold']:.4g}), {summary['hard']} hard, "
        f"{identical} identical; median gap {np.median([row['gap'] for row in rows]):.3g}, score spread {spread:.3g}",
        highlight=False,
    )
    counts, edges = np.histogram([row["gap"] for row in rows], bins=12)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(40 * int(count) / max(1, int(counts.max())))
        console.print(f"{low:7.2f} to {high:6.2f} {count:6d} {bar}", highlight=False)
    for title, part in (("hardest", rows[:2]), ("easiest", rows[-2:])):
        for row in part:
            console.print(f"\n{title}, gap {row['gap']:.3f}", style="bold", highlight=False)
            asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            console.print(Text(f"  prompt    {asked}"))
            for name, completion, score in zip(("chosen", "rejected"), row["completions"], row["scores"], strict=True):
                console.print(Text(f"  {name:<8}  {score:+.3f}  {completion}"))
    console.print(f"\nrows: {folder}", highlight=False, soft_wrap=True)
