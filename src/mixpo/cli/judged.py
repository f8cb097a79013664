"""`mixpo judge`: ask language models which of two arms completes better."""

import math
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixpo.data.errors import InputError

if TYPE_CHECKING:
    from mixpo.judge.asking import Progress
    from mixpo.judge.questions import Question
    from mixpo.report.document import Group

PLAIN_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


def judge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/world.")],
    arms: Annotated[tuple[str, str], typer.Option(help="The two arms; win and lose are the first one's.")],
    model: Annotated[list[str], typer.Option(help="The judge's name at the endpoint; again for further judges.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible; its key in OPENAI_API_KEY.")] = (
        "https://api.openai.com/v1"
    ),
    prompts: Annotated[int | None, typer.Option(help="So many test prompts, drawn; all if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run; the first at which both arms finished.")] = None,
    draw: Annotated[int, typer.Option(help="Another number draws other prompts.")] = 0,
    template: Annotated[Path | None, typer.Option(help="Jinja2; the paper's prompt if not given.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Of a reply, at most.")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="At a question, where the server fails.")] = 6,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request.")] = 120.0,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many in this call.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many in this call, prompts and replies.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print a prompt and the number of calls.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of a progress bar.")] = False,
) -> None:
    """Ask LLM judges which of two arms completes better, in both orders, and keep every verdict in RUN/judge.

    What was asked is not asked again: after a stop the same command goes on.
    """
    from mixpo.experiments.comparisons import compared_seed, comparisons
    from mixpo.experiments.results import load
    from mixpo.judge.endpoint import checked, key_for
    from mixpo.judge.judging import judged, questions
    from mixpo.judge.questions import Judge, digest, read_template
    from mixpo.judge.verdicts import FILE, appending, panel_row, read
    from mixpo.report.judges import groups, rows_of

    results = load(run)
    at = compared_seed(results, arms, seed)
    rows = comparisons(results, arms, seed=at, prompts=prompts, draw=draw)
    if wrong := [name for place, name in enumerate(model) if name in model[:place] or not name.isprintable()]:
        raise InputError(f"--model: found {wrong[0]!r} twice or unprintable; expected different names of models")
    if not (math.isfinite(temperature) and math.isfinite(timeout)):
        raise InputError("--temperature, --timeout: found a number without an end; expected finite ones")
    words, address = read_template(template), checked(endpoint)
    judges = [Judge(name, address, temperature, reply_tokens, digest(words.text)) for name in model]
    asked = [questions(one, words, arms, at or 0, rows) for one in judges]
    every = {question.id: question for _, some in asked for question in some}
    if dry_run:
        _show_dry_run(list(every.values()), read(run / FILE).answers.keys())
        return
    with appending(run / FILE) as keep:
        kept, done = read(run / FILE), None
        missing = [question for number, question in every.items() if number not in kept.answers]
        if missing:
            from mixpo.judge.asking import Limits, ask

            key = key_for(address)
        for panel, _ in asked:
            if not kept.has(panel):
                keep(panel_row(panel))
        if missing:
            limits = Limits(concurrency, attempts, timeout, max_requests, max_tokens)
            with _watching(len(missing), run / FILE, plain=quiet) as watch:
                done = ask(missing, key, limits, keep, watch)
    answers = read(run / FILE).answers
    found = [judged(panel, arms, rows, answers) for panel, _ in asked]
    for group in groups(found, rows_of(found)):
        _show(group)
    _say(f"{len(every) - len(missing)} of {len(every)} questions were answered before; verdicts: {run / FILE}")
    if done is not None:
        _show_end(done)


def _show_dry_run(every: "list[Question]", answered: Container[str]) -> None:
    known = sum(question.id in answered for question in every)
    if every:
        _say(every[0].text + "\n")
    _say(f"{len(every)} questions, {known} of them answered: {len(every) - known} calls")


@contextmanager
def _watching(questions: int, file: Path, *, plain: bool) -> "Iterator[Callable[[Progress], None]]":
    """A progress bar in a terminal, a line now and then elsewhere; what is kept where it is stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console, answered = Console(), 0
    columns = (TextColumn("judging"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    plain = plain or not console.is_terminal
    bars = Bars(*columns, TextColumn("{task.fields[spent]}"), console=console, disable=plain)
    task, printed = bars.add_task("", total=questions, spent=""), time.monotonic()

    def watch(progress: "Progress") -> None:
        nonlocal answered, printed
        answered = progress.answered
        over, spent = progress.questions - progress.left, f"{progress.requests} requests, {progress.tokens:,} tokens"
        bars.update(task, completed=over, spent=spent)
        if plain and time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            _say(f"judging: {over}/{questions}, {spent}")

    try:
        with bars:
            yield watch
    except KeyboardInterrupt:
        _say(f"stopped; {answered} answers of {questions} are kept in {file}; the same command goes on where this was")
        raise


def _show(group: "Group") -> None:
    """A table on its side, a column a row of the report's."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, found = Console(), group.table.rows if group.table is not None else ()
    width = max((len(cell) for row in found for cell in row[1:]), default=0) + 2
    beside = max(1, (console.width - 21) // width)
    for start in range(0, len(found), beside):
        assert group.table is not None
        first, *headings = group.table.headings
        part = found[start : start + beside]
        shown = Table(first, title=Text(group.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown.columns[0].no_wrap = True
        for name, *cells in part:
            shown.add_column(Text(name), justify="right", overflow="fold", min_width=max(map(len, cells)))
        for heading, *cells in zip(headings, *(row[1:] for row in part), strict=True):
            shown.add_row(heading, *map(Text, cells))
        console.print(shown)
    for line in (*(group.table.notes if group.table is not None else ()), *group.notes):
        _say(line)


def _show_end(done: "Progress") -> None:
    """What was spent, and what is left; exit code 1 where questions failed."""
    _say(f"{done.requests} requests, {done.tokens:,} tokens, {done.answered} of {done.questions} questions answered")
    for kind, said in done.failures.items():
        print(f"{len(said)} questions failed: {kind}: {said[-1]}", file=sys.stderr)
    if done.stopped:
        print(f"stopped: {done.stopped}; {done.left} questions are left; the same command asks them", file=sys.stderr)
    if done.failures:
        raise typer.Exit(1)


def _say(line: str) -> None:
    from rich.console import Console

    Console().print(line, markup=False, highlight=False, soft_wrap=True)
