"""Terminal output: progress of a run and of judging, tables, the plan of a run, and a selection."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from mixpo.experiments.plan import PlannedStage
from mixpo.experiments.results import Results, format_first_names
from mixpo.experiments.run import RunDisplay
from mixpo.experiments.run_costs import RunCosts, list_parts
from mixpo.experiments.workers import Outcome, StageFailure
from mixpo.report import document as report
from mixpo.report.arms import build_main_table
from mixpo.stages.rows import read_table
from mixpo.stages.stage_cache import read_stage_summary

if TYPE_CHECKING:
    from mixpo.judge.client import JudgingProgress

SHOWN_METRICS = ("loss", "accuracy", "score", "kl", "end_rate", "sampled_end_rate")
OPTIONAL_COLUMNS = ("tokens", "end rate", "win/tie/lose", "sd of")
"""First words of the headings of columns that are hidden in a narrow terminal, in this order."""
NAME_WIDTH = 24
"""Smallest width, in characters, of the column of arms' names, unless hiding all optional columns is not enough."""
PLAIN_SECONDS = 10.0
"""Seconds between two plain lines of progress, of one stage or of judging."""


class TerminalRunDisplay:
    """Terminal display of a run: a progress bar a stage, or if `plain` lines of text at start, end and in between."""

    def __init__(self, progress: Progress, *, plain: bool) -> None:
        self.progress, self.plain = progress, plain

    def start_stage(self, stage_kind: str, identity: str, arms: Sequence[str]) -> "TerminalStageDisplay":
        """Show that a stage is being computed for these arms, and return the display of its progress."""
        return TerminalStageDisplay(self, f"{stage_kind} {identity}", arms)

    def on_message(self, text: str) -> None:
        """Print a message of the run above the bars."""
        print_line(text, self.progress.console)


class TerminalStageDisplay:
    """Terminal display of one stage, as a progress bar or as lines of text."""

    def __init__(self, run: TerminalRunDisplay, name: str, arms: Sequence[str]) -> None:
        self.run, self.name, self.printed = run, name, time.monotonic()
        self.task = run.progress.add_task(name, total=None, metrics=f"for {format_first_names(arms)}")
        if run.plain:
            self.on_message(f"started (for {format_first_names(arms)})")

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show the steps done and the last metrics; as a line of text only every `PLAIN_SECONDS`."""
        brief = _format_brief_metrics(metrics)
        self.run.progress.update(self.task, completed=done, total=total, metrics=brief)
        if self.run.plain and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            self.on_message(f"{done}/{total} {brief}".rstrip())

    def on_message(self, text: str) -> None:
        """Print a message of the stage above the bars."""
        self.run.on_message(f"{self.name}: {text}")

    def on_end(self, outcome: Outcome) -> None:
        """Remove the bar and print how many seconds the stage took, or why it failed."""
        self.run.progress.remove_task(self.task)
        if isinstance(outcome, StageFailure):
            self.on_message(f"failed: {outcome.reason.removeprefix(f'{self.name}: ')}")
        else:
            self.on_message(f"done in {outcome:.1f} s")


@contextmanager
def open_run_display(*, plain: bool) -> Iterator[RunDisplay]:
    """Context manager that yields a display of a run: progress bars, or in a pipe or if `plain` lines of text."""
    console = Console()
    plain = plain or not console.is_terminal
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[metrics]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    try:
        with Progress(*columns, console=console, expand=True, disable=plain) as progress:
            yield TerminalRunDisplay(progress, plain=plain)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to resume")
        raise


@contextmanager
def open_judging_display(total: int, file: Path, *, plain: bool) -> Iterator[Callable[["JudgingProgress"], None]]:
    """Context manager that yields a function that shows progress as a bar or lines; Ctrl-C prints what is saved."""
    console, done = Console(), 0
    columns = (TextColumn("judging"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    plain = plain or not console.is_terminal
    bars = Progress(*columns, TextColumn("{task.fields[spent]}"), console=console, disable=plain)
    task, printed = bars.add_task("", total=total, spent=""), time.monotonic()

    def show_progress(progress: "JudgingProgress") -> None:
        nonlocal done, printed
        done = progress.done
        over = progress.questions - progress.remaining_questions
        spent = f"{progress.requests} requests, {progress.tokens:,} tokens"
        bars.update(task, completed=over, spent=spent)
        if plain and time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            print_line(f"judging: {over}/{total}, {spent}")

    try:
        with bars:
            yield show_progress
    except KeyboardInterrupt:
        print_line(f"stopped; {done} of {total} questions are done and kept in {file}; rerun to resume")
        raise


def print_judging_totals(progress: "JudgingProgress") -> None:
    """Print the requests and tokens spent, failures and questions left."""
    print_line(
        f"{progress.requests} requests, {progress.tokens:,} tokens, "
        f"{progress.done} of {progress.questions} questions done"
    )
    for kind, messages in progress.failures.items():
        print(f"{len(messages)} questions failed: {kind}: {messages[-1]}", file=sys.stderr)
    if progress.stop_reasons:
        reasons = "; ".join(progress.stop_reasons)
        print(
            f"stopped: {reasons}; {progress.remaining_questions} questions are left; the same command asks them",
            file=sys.stderr,
        )


def print_line(text: str, console: Console | None = None) -> None:
    """Print a text as it is, without markup, colours or line breaks at the terminal's width."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True)


def _format_brief_metrics(metrics: Mapping[str, float]) -> str:
    """Format tokens per second and the metrics of `SHOWN_METRICS`, without PPO's loss, which says nothing."""
    speed = []
    if metrics.get("seconds") and metrics.get("tokens"):
        speed.append(f"{metrics['tokens'] / metrics['seconds']:.0f} tokens/s")
    names = [name for name in SHOWN_METRICS if name in metrics and (name != "loss" or "kl" not in metrics)]
    return "  ".join([*speed, *(f"{name} {metrics[name]:.3g}" for name in names)])


def print_main_table(results: Results) -> None:
    """Print the main table of arms, in a narrow terminal without the less important columns."""
    console = Console()
    table = build_main_table(results, with_paper_columns=False)
    optional = [heading for start in OPTIONAL_COLUMNS for heading in table.headings if heading.startswith(start)]
    layouts = [([], True, NAME_WIDTH), *((optional[:count], False, NAME_WIDTH) for count in range(len(optional) + 1))]
    for hidden, one_line, name_width in [*layouts, (optional, False, NAME_WIDTH // 3)]:
        main = _build_terminal_main_table(results, table, hidden, intervals_beside=one_line, name_width=name_width)
        if Measurement.get(console, console.options.update_width(1000), main).minimum <= console.width:
            break
    console.print(main)
    if hidden:
        note = f"Hidden at this width: {', '.join(hidden)}; a wider terminal or `mixpo report` shows them."
        print_line(note, console)
    for line in table.notes:
        print_line(line, console)


def _build_terminal_main_table(
    results: Results, table: report.Table, hidden: Sequence[str], *, intervals_beside: bool, name_width: int
) -> Table:
    """Convert the report's main table for the terminal, without hidden columns, intervals beside or below means."""
    title = f"{results.run_names}: means with 95% intervals"
    main = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = [index for index, heading in enumerate(table.headings) if heading not in hidden]
    rows = [[Text(row[n] if intervals_beside else row[n].replace(" [", "\n[")) for n in columns] for row in table.rows]
    for index, heading in enumerate(table.headings[column] for column in columns):
        words = [word for row in rows for word in row[index].plain.split("\n" if index else None)]
        width = max(map(cell_len, [*heading.split(), *words]))
        if index == 0:
            main.add_column(heading, overflow="fold", min_width=min(width, name_width))
        else:
            main.add_column(heading, justify="right", width=width)
    for row in rows:
        main.add_row(*row)
    return main


def print_report_table(table: report.Table, title: str) -> None:
    """Print a table of a report and its notes, transposed where the terminal is too narrow for it."""
    console = Console()
    lines = [table.headings, *table.rows]
    parts = [_build_terminal_table(title, lines)]
    if Measurement.get(console, console.options.update_width(10_000), parts[0]).maximum > console.width:
        first, *others = (max(map(cell_len, line)) for line in lines)
        columns = max(1, (console.width - first) // (max(others, default=0) + 3))
        chunks = [lines[start : start + columns] for start in range(1, len(lines), columns)]
        parts = [_build_terminal_table(title, list(zip(lines[0], *chunk, strict=True))) for chunk in chunks]
    for part in parts:
        console.print(part)
    for note in table.notes:
        print_line(note, console)


def _build_terminal_table(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """Build a table for the terminal of lines of cells, the first of which are the headings."""
    headings, *rows = lines
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_run_results(results: Results, page: Path, *, computed: int | None = None, cached: int | None = None) -> None:
    """Print the main table, the number of computed and cached stages, and the paths of models and report."""
    console = Console()
    print_main_table(results)
    if computed is not None:
        console.print(f"{computed} stages computed, {cached} found in the cache", highlight=False)
    aligned = "mpo" if "mpo" in results.arm_names else results.arm_names[-1]
    for arm in results.list_arm_results(aligned):
        if arm.model:
            console.print(f"model ({arm.arm}, seed {arm.seed}): {arm.model}", highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def print_plan(plan: list[tuple[str, list[PlannedStage]]]) -> None:
    """Print the plan of a run: the tree of stages of every arm, each cached or why it would be computed."""
    console = Console()
    for heading, stages in plan:
        root = Tree(Text(heading, style="bold"))
        branches = [root]
        for stage in stages:
            name = f"{stage.field}: {stage.kind}" if stage.field else stage.kind
            state = ("cached", "green") if stage.done else (stage.reason, "yellow")
            above = ("  (above)" if stage.is_repeated else "", "dim")
            text = Text.assemble(name, " ", (stage.identity, "cyan"), "  ", state, above)
            del branches[stage.depth + 1 :]
            branches.append(branches[stage.depth].add(text))
        console.print(root)


def print_run_costs(costs: RunCosts) -> None:
    """Print memory, tokens, FLOPs and time of the stages that are not cached, a line each, and what was assumed."""
    console = Console()
    if costs.lines:
        work, memory = _make_plan_table("tokens", "FLOPs", "time"), _make_plan_table("GB", "fullest moment")
        memory.columns[2].justify = "left"
        for name, cost, count in costs.lines:
            amounts = f"{count * cost.tokens:.3g}", f"{count * cost.flops:.3g}", format_duration(count * cost.seconds)
            parts = sorted(list_parts(cost.footprint), key=lambda part: -part[1])
            shown = ", ".join(f"{part} {amount / 1e9:.1f}" for part, amount in parts if amount >= 5e7)
            work.add_row(name, *amounts)
            memory.add_row(name, f"{cost.footprint.total / 1e9:.1f}", f"{cost.moment}: {shown}")
        console.print(work)
        console.print(memory)
        tokens, flops, seconds = (
            sum(getattr(cost, name) * count for _, cost, count in costs.lines)
            for name in ("tokens", "flops", "seconds")
        )
        print_line(f"all: {tokens:.3g} tokens, {flops:.3g} FLOPs, {format_duration(seconds)}", console)
    if costs.cached:
        print_line(f"{costs.cached} stages are cached and cost nothing", console)
    for line in costs.assumptions:
        print_line(line, console)


def _make_plan_table(*headings: str) -> Table:
    """An empty table of stages with columns of numbers."""
    columns = [Column("stage"), *(Column(heading, justify="right") for heading in headings)]
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def format_duration(seconds: float) -> str:
    """A duration in its largest fitting unit: `12 s`, `3.4 min`, `5.1 h`, `2.0 days`."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def print_pair_selection(selection_folder: Path) -> None:
    """Print the sizes of a selection, the histogram of score gaps, and its two hardest and two easiest pairs."""
    console = Console()
    summary = read_stage_summary(selection_folder)
    pairs = [row for part in ("easy", "hard") for row in read_table(selection_folder / f"{part}.parquet")]
    rows = sorted(pairs, key=lambda row: float(row["gap"]))
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
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            console.print(Text(f"  prompt    {prompt}"))
            for name, completion, score in zip(("chosen", "rejected"), row["completions"], row["scores"], strict=True):
                console.print(Text(f"  {name:<8}  {score:+.3f}  {completion}"))
    console.print(f"\nrows: {selection_folder}", highlight=False, soft_wrap=True)
