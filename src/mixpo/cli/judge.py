"""`mixpo judge`: comparison of two arms by language models."""

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mixpo.data.errors import InputError

Number = TypeVar("Number", int, float)


def judge_arms(
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
    """Compare two arms by LLM judges, each pair in both orders, and write every verdict to RUN/judge.

    No question is asked twice: after an interruption run the same command again.
    """
    from mixpo.cli.display import open_judging_display, print_judging_totals, print_line, print_report_table
    from mixpo.data.text import escape_invisible
    from mixpo.experiments.comparisons import choose_compared_seed, pair_completions
    from mixpo.experiments.results import load_runs
    from mixpo.judge.endpoint import is_unencrypted_endpoint, normalize_endpoint, read_api_key
    from mixpo.judge.outcomes import decide_current_verdicts, keep_assigned_arm_order, make_assignment
    from mixpo.judge.questions import make_judges, read_template
    from mixpo.judge.verdicts import FILE, make_assignment_row, open_verdicts_for_append, read_verdicts
    from mixpo.report.judges import build_judge_groups, compute_verdict_rows

    results = load_runs(run)
    at = choose_compared_seed(results, arms, seed)
    before = read_verdicts(run / FILE)
    order = keep_assigned_arm_order(before, arms, at)
    rows = pair_completions(results, order, seed=at, prompt_count=prompts, draw_seed=draw)
    if not math.isfinite(timeout):
        raise InputError(f"--timeout: found {timeout}; expected a finite number")
    prompt_template, address = read_template(template), normalize_endpoint(endpoint)
    settings = (_parse_number("--temperature", temperature, 0.0), _parse_number("--reply-tokens", reply_tokens, 1))
    judges = make_judges(model, address, *settings, prompt_template)
    assignments = [make_assignment(judge, prompt_template, order, at, rows) for judge in judges]
    by_id = {question.id: question for _, questions_of_judge in assignments for question in questions_of_judge}
    if dry_run:
        answered = before.scores.keys() & by_id.keys()
        if by_id:
            print_line(escape_invisible(next(iter(by_id.values())).text) + "\n")
        print_line(f"{len(by_id)} questions, {len(answered)} of them asked before: {len(by_id) - len(answered)} calls")
        return
    with open_verdicts_for_append(run / FILE) as keep:
        saved, progress = read_verdicts(run / FILE), None
        missing = [question for number, question in by_id.items() if number not in saved.scores]
        if missing:
            from mixpo.judge.client import RequestLimits, ask_questions

            key = read_api_key()
            if key and is_unencrypted_endpoint(address):
                print(f"--endpoint: {address} gets the key in the clear; expected https://", file=sys.stderr)
        for assignment, _ in assignments:
            if not saved.contains_assignment(assignment):
                keep(make_assignment_row(assignment))
        if missing:
            limits = RequestLimits(concurrency, attempts, timeout, max_requests, max_tokens)
            working_judges = {question.judge for number, question in by_id.items() if number in saved.scores}
            with open_judging_display(len(missing), run / FILE, plain=quiet) as show_progress:
                progress = ask_questions(missing, key, limits, keep, show_progress, working_judges=working_judges)
    scores = read_verdicts(run / FILE).scores
    judgements = [decide_current_verdicts(assignment, order, rows, scores) for assignment, _ in assignments]
    judgements = judgements if order == arms else [one.swap_arms() for one in judgements]
    for group in build_judge_groups(judgements, compute_verdict_rows(judgements)):
        if group.table is not None:
            print_report_table(group.table, group.title)
        for note in group.notes:
            print_line(note)
    print_line(f"{len(by_id) - len(missing)} of {len(by_id)} questions were asked before; verdicts: {run / FILE}")
    if progress is not None:
        print_judging_totals(progress)
        if progress.failures:
            raise typer.Exit(1)


def _parse_number(option: str, text: str, minimum: Number) -> Number | None:
    """Parse an option's number of at least the minimum; None for `none`. Raises `InputError` on anything else."""
    if text == "none":
        return None
    with suppress(ValueError):
        number = type(minimum)(text)
        if minimum <= number < math.inf:
            return number
    whole = "a whole number" if isinstance(minimum, int) else "a number"
    raise InputError(f"{option}: found {text!r}; expected {whole} from {minimum:g}, or none")
