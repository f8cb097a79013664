"""What does an LLM judge say? Verdicts of language models on two arms, and how far to trust them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mixpo.algorithms.intervals import Interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.comparisons import list_categories
from mixpo.experiments.results import Results, list_first
from mixpo.judge.outcomes import JudgeResult, Tally, compute_agreement, load_judge_results, tally_verdicts
from mixpo.judge.questions import Judge
from mixpo.report.arms import compared
from mixpo.report.comparison import UNTOLD, counted, interval_text, p_text, verdict
from mixpo.report.document import Group, Section, Table

NOTES = (
    "win, lose: the shares of prompts on which the judge scores the first arm's completion higher, or lower, in both "
    "orders of the two; all others are ties. Flips: how often each order had another winner; to the first: how many of "
    "the flips the completion shown first won, half of them if places count for nothing.",
    "Longer wins: how often the longer completion (in characters) wins, where one wins. Win at equal length: the win "
    "rate, a tie being half a win, by a logistic regression on the difference of lengths (Dubois et al. 2024).",
)


@dataclass(frozen=True)
class Row:
    """A line of a table: two arms before a judge, on all prompts or on those of a category."""

    judged: JudgeResult
    category: str | None
    tally: Tally
    p: float
    """Of no difference, corrected for all rows of all judges."""


def section(results: Results) -> Section | None:
    """A table a judge, and their agreement; nothing where no judge was asked."""
    found = load_judge_results(results)
    if not found:
        return None
    rows = rows_of(found)
    return Section("judges", "LLM judges", _opening(results, found, rows), groups(found, rows))


def rows_of(found: Sequence[JudgeResult]) -> list[Row]:
    """Every line that has a verdict."""
    told = []
    for one in found:
        for category in (None, *list_categories([each.pair for each in one.verdicts])):
            if (counts := tally_verdicts(one.filter_by_category(category))) is not None:
                told.append((one, category, counts))
    corrected = correct_by_holm([counts.p for *_, counts in told])
    return [Row(*each, p) for each, p in zip(told, corrected, strict=True)]


def groups(found: Sequence[JudgeResult], rows: Sequence[Row]) -> list[Group]:
    """A table a judge, and the agreement of several."""
    names = labels(found)
    seeds = len({one.seed for one in found}) > 1
    tables = [_of_judge(judge, name, found, rows, seeds) for judge, name in names.items()]
    if agreed := _agreement_rows(found, names, seeds):
        headings = ["judges", "arms", "prompts", "agreement beyond chance"]
        note = "Cohen's kappa of every two judges, and Krippendorff's alpha with its 95% interval of several together."
        tables.append(Group("Agreement of judges", table=Table(headings, agreed, [note])))
    corrected = f", corrected for all {len(rows)} rows (Holm)" if len(rows) > 1 else ""
    p = f"p: of no difference, by the sign test of wins against defeats{corrected}."
    over = (
        "Intervals are 95%, over prompts at one seed, and say nothing of other seeds: Wilson's of shares, Agresti and "
        "Min's (2005) of win − lose."
    )
    return [*tables, Group(notes=[*NOTES, p, over])]


def labels(found: Sequence[JudgeResult]) -> dict[Judge, str]:
    """A judge's model, with the settings that tell it from others of the same model."""
    judges = list(dict.fromkeys(one.judge for one in found))
    names = {}
    for judge in judges:
        twins = [asdict(one) for one in judges if one.model == judge.model]
        own = [f"{key} {value}" for key, value in asdict(judge).items() if len({twin[key] for twin in twins}) > 1]
        names[judge] = ", ".join([judge.model, *(text.replace("_", " ", 1) for text in own)])
    return names


def _of_judge(judge: Judge, name: str, found: Sequence[JudgeResult], rows: Sequence[Row], seeds: bool) -> Group:
    headings = ["arms", "prompts", "win", "tie", "lose", "win − lose", "p"]
    headings += ["flips", "flips to the first", "longer wins", "win at equal length"]
    lines = []
    for row in rows:
        if row.judged.judge == judge:
            counts, arms = row.tally, _pair(row.judged, seeds)
            shares = [counts.win, counts.tie, counts.lose, counts.difference]
            lines.append(
                [
                    arms if row.category is None else f"{arms}: {row.category}",
                    str(counts.prompts),
                    *map(interval_text, shares),
                    p_text(row.p),
                    *map(_or_nothing, (counts.flips, counts.first, counts.longer)),
                    interval_text(counts.equal_length) if counts.equal_length is not None else UNTOLD,
                ]
            )
    notes = [
        f"Asked at {judge.endpoint}, {_settings(judge)}, template {judge.template}.",
        *(said for one in found if one.judge == judge and (said := _left_out(one, seeds))),
    ]
    return Group(name, table=Table(headings, lines) if lines else None, notes=notes)


def _settings(judge: Judge) -> str:
    temperature = "its own temperature" if judge.temperature is None else f"temperature {judge.temperature:g}"
    limit = "replies as long as it likes"
    if judge.reply_tokens is not None:
        limit = f"{judge.reply_tokens} tokens a reply at most"
    return f"{temperature}, {limit}"


def _or_nothing(interval: Interval | None) -> str:
    return "" if interval is None else interval_text(interval)


def _pair(one: JudgeResult, seeds: bool) -> str:
    return f"{one.arms[0]} vs {one.arms[1]}" + (f", seed {one.seed}" if seeds else "")


def _left_out(one: JudgeResult, seeds: bool) -> str:
    """What is no verdict of a judge, counted."""
    same = sum(each.pair.same for each in one.verdicts)
    unparsed = sum(each.unparsed for each in one.verdicts)
    open_ = sum(each.outcome is None for each in one.verdicts) - unparsed
    part = ", counted in proportion to the others that have a verdict" if unparsed or open_ else ""
    said = [
        f"the same text on {counted(same, 'prompt')}, a tie that nobody was asked" + part if same else "",
        f"no verdict on {counted(unparsed, 'prompt')}, a reply to which could not be parsed" if unparsed else "",
        f"no reply yet on {counted(open_, 'prompt')}" if open_ else "",
        f"{counted(one.stale, 'prompt')} left out, judged before completions changed" if one.stale else "",
    ]
    return f"{_pair(one, seeds)}: {'; '.join(filter(None, said))}." if any(said) else ""


def _agreement_rows(found: Sequence[JudgeResult], names: dict[Judge, str], seeds: bool) -> list[list[str]]:
    rows = []
    for pair in dict.fromkeys((one.arms, one.seed) for one in found):
        both = [one for one in found if (one.arms, one.seed) == pair]
        if len(both) < 2:
            continue
        agreed, arms = compute_agreement(both), _pair(both[0], seeds)
        for one, other, count, kappa in agreed.kappas:
            rows.append([f"{names[one]} and {names[other]}", arms, str(count), _told(kappa, f"{kappa:z.2f}")])
        alpha = _told(agreed.alpha.mean, interval_text(agreed.alpha))
        rows.append([f"all {len(both)}", arms, str(agreed.pairs), alpha])
    return rows


def _told(value: float, text: str) -> str:
    return UNTOLD if math.isnan(value) else text


def _opening(results: Results, found: Sequence[JudgeResult], rows: Sequence[Row]) -> str:
    """What the judges of the two arms that come first say."""
    whole = [row for row in rows if row.category is None]
    stale = sum(one.stale for one in found)
    if not whole:
        return (
            f"No verdict is known of these completions; {counted(stale, 'prompt')} had others when they were judged."
            if stale
            else "Judges were asked, and nothing that they replied is a verdict."
        )
    pair = compared(results)
    first = next((row for row in whole if row.judged.arms == pair), whole[0]).judged
    shown = [row for row in whole if (row.judged.arms, row.judged.seed) == (first.arms, first.seed)]
    names, (one, other) = labels(found), first.arms
    said = []
    for row in shown[:3]:
        counts = row.tally
        flips = "" if counts.flips is None else f"; {counts.flips.mean:.0%} of those asked flip with the order"
        flips += "" if counts.first is None else f", {counts.first.mean:.0%} of these to the completion shown first"
        said.append(
            f"{names[row.judged.judge]} scores {one} higher than {other} on {counts.win.mean:.0%} of "
            f"{counted(counts.prompts, 'prompt')} and lower on {counts.lose.mean:.0%}: difference "
            f"{verdict(counts.difference, row.p)}{flips}."
        )
    if len(shown) > 3:
        said.append(f"The others are {list_first([names[row.judged.judge] for row in shown[3:]])}.")
    if stale:
        said.append(f"{counted(stale, 'prompt')} judged before completions changed are left out.")
    return " ".join(said)
