"""`mixpo judge`: ask language models which of two arms completes better."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mixpo.data.errors import InputError

if TYPE_CHECKING:
    from mixpo.judge.asking import Progress

Number = TypeVar("Number", int, float)

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
    temperature: Annotated[
        str, typer.Option(help="From 0; none sends none, for models that refuse any but their own.")
    ] = "0",
    reply_tokens: Annotated[
        str, typer.Option(help="Of a reply, at most; none sends no max_tokens, for models that refuse it.")
    ] = "1024",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="At a question, where the server fails.")] = 6,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request.")] = 120.0,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many in this call.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many in this call; a time-out counts as --reply-tokens.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print a prompt and the number of calls.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of a progress bar.")] = False,
) -> None:
    """Ask LLM judges which of two arms completes better, in both orders, and keep every verdict in RUN/judge.

    What was asked is not asked again: after a stop the same command goes on.
    """
    from mixpo.cli.display import show
    from mixpo.data.text import escape_invisible
    from mixpo.experiments.comparisons import choose_compared_seed, pair_completions
    from mixpo.experiments.results import load_runs
    from mixpo.judge.endpoint import checked, is_sent_in_clear, key_in_environment
    from mixpo.judge.judging import as_judged, judged, questions
    from mixpo.judge.questions import judges, read_template
    from mixpo.judge.verdicts import FILE, appending, assignment_row, read
    from mixpo.report.judges import groups, rows_of

    results = load_runs(run)
    at = choose_compared_seed(results, arms, seed)
    before = read(run / FILE)
    order = as_judged(before, arms, at)
    rows = pair_completions(results, order, seed=at, prompts=prompts, draw=draw)
    if not math.isfinite(timeout):
        raise InputError(f"--timeout: found {timeout}; expected a finite number")
    words, address = read_template(template), checked(endpoint)
    settings = _number("--temperature", temperature, 0.0), _number("--reply-tokens", reply_tokens, 1)
    asked = [questions(one, words, order, at, rows) for one in judges(model, address, *settings, words)]
    every = {question.id: question for _, some in asked for question in some}
    if dry_run:
        known = before.scores.keys() & every.keys()
        if every:
            _say(escape_invisible(next(iter(every.values())).text) + "\n")
        _say(f"{len(every)} questions, {len(known)} of them asked before: {len(every) - len(known)} calls")
        return
    with appending(run / FILE) as keep:
        kept, done = read(run / FILE), None
        missing = [question for number, question in every.items() if number not in kept.scores]
        if missing:
            from mixpo.judge.asking import Limits, ask

            key = key_in_environment()
            if key and is_sent_in_clear(address):
                print(f"--endpoint: {address} gets the key in the clear; expected https://", file=sys.stderr)
        for assignment, _ in asked:
            if not kept.has(assignment):
                keep(assignment_row(assignment))
        if missing:
            limits = Limits(concurrency, attempts, timeout, max_requests, max_tokens)
            proven = {question.judge for number, question in every.items() if number in kept.scores}
            with _watching(len(missing), run / FILE, plain=quiet) as watch:
                done = ask(missing, key, limits, keep, watch, proven=proven)
    scores = read(run / FILE).scores
    found = [judged(assignment, order, rows, scores) for assignment, _ in asked]
    found = found if order == arms else [one.turned() for one in found]
    for group in groups(found, rows_of(found)):
        if group.table is not None:
            show(group.table, group.title)
        for note in group.notes:
            _say(note)
    _say(f"{len(every) - len(missing)} of {len(every)} questions were asked before; verdicts: {run / FILE}")
    if done is not None:
        _show_end(done)


def _number(option: str, text: str, least: Number) -> Number | None:
    """What an option of a number or none says. Raises `InputError`."""
    if text == "none":
        return None
    with suppress(ValueError):
        number = type(least)(text)
        if least <= number < math.inf:
            return number
    whole = "a whole number" if isinstance(least, int) else "a number"
    raise InputError(f"{option}: found {text!r}; expected {whole} from {least:g}, or none")


@contextmanager
def _watching(questions: int, file: Path, *, plain: bool) -> "Iterator[Callable[[Progress], None]]":
    """A progress bar in a terminal, a line now and then elsewhere; what is kept where it is stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console, done = Console(), 0
    columns = (TextColumn("judging"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    plain = plain or not console.is_terminal
    bars = Bars(*columns, TextColumn("{task.fields[spent]}"), console=console, disable=plain)
    task, printed = bars.add_task("", total=questions, spent=""), time.monotonic()

    def watch(progress: "Progress") -> None:
        nonlocal done, printed
        done = progress.done
        over, spent = progress.questions - progress.left, f"{progress.requests} requests, {progress.tokens:,} tokens"
        bars.update(task, completed=over, spent=spent)
        if plain and time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            _say(f"judging: {over}/{questions}, {spent}")

    try:
        with bars:
            yield watch
    except KeyboardInterrupt:
        _say(f"stopped; {done} of {questions} questions are done and kept in {file}; the same command goes on there")
        raise


def _show_end(done: "Progress") -> None:
    """What was spent, and what is left; exit code 1 where questions failed."""
    _say(f"{done.requests} requests, {done.tokens:,} tokens, {done.done} of {done.questions} questions done")
    for kind, said in done.failures.items():
        print(f"{len(said)} questions failed: {kind}: {said[-1]}", file=sys.stderr)
    if done.stopped:
        why = "; ".join(done.stopped)
        print(f"stopped: {why}; {done.left} questions are left; the same command asks them", file=sys.stderr)
    if done.failures:
        raise typer.Exit(1)


def _say(line: str) -> None:
    from rich.console import Console

    Console().print(line, markup=False, highlight=False, soft_wrap=True)
