"""Verdicts of LLM judges on two arms, their position and length biases, and their agreement."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mixpo.algorithms.intervals import Interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.algorithms.win_rates import PreferenceShares
from mixpo.experiments.comparisons import list_categories
from mixpo.experiments.results import Results, format_first_names
from mixpo.judge.outcomes import (
    JudgeVerdicts,
    VerdictShares,
    compute_judge_agreement,
    compute_verdict_shares,
    load_judge_verdicts,
)
from mixpo.judge.questions import Judge
from mixpo.report.arms import choose_headline_arms
from mixpo.report.comparison import describe_difference, format_count, format_estimate, format_interval, format_p_value
from mixpo.report.document import Section, SectionGroup, Table

SHARE_HEADINGS = ("win", "tie", "lose", "win − lose", "p")

NOTES = (
    "win, lose: shares of prompts on which the judge prefers the first arm, or the second, in both orders; the rest "
    "are ties. Flips: share of prompts on which the two orders have different winners; to the first: share of flips "
    "won by the completion shown first, 50% without position bias.",
    "Longer wins: share of decided prompts that the longer completion (in characters) wins. Win at equal length: win "
    "rate, a tie counting half, by logistic regression on the difference in length (Dubois et al. 2024).",
)


@dataclass(frozen=True)
class VerdictRow:
    """A judge's shares of verdicts on two arms at a seed, over all prompts or one category, and their corrected p."""

    judged: JudgeVerdicts
    category: str | None
    tally: VerdictShares
    p: float
    """The p of no difference, corrected for all rows of all judges."""


def build_judges_section(results: Results) -> Section | None:
    """The section with a table for every LLM judge, and their agreement; None without judges."""
    verdicts = load_judge_verdicts(results)
    if not verdicts:
        return None
    rows = compute_verdict_rows(verdicts)
    opening = _summarize_verdicts(results, verdicts, rows)
    return Section("judges", "LLM judges", opening, build_judge_groups(verdicts, rows))


def compute_verdict_rows(verdicts: Sequence[JudgeVerdicts]) -> list[VerdictRow]:
    """A row for every judge, pair of arms, seed and category with a verdict; p corrected for all rows (Holm)."""
    tallies = []
    for one in verdicts:
        for category in (None, *list_categories([each.pair for each in one.verdicts])):
            of_category = [each for each in one.verdicts if category in (None, each.pair.category)]
            if (counts := compute_verdict_shares(of_category)) is not None:
                tallies.append((one, category, counts))
    corrected = correct_by_holm([counts.p for *_, counts in tallies])
    return [VerdictRow(*each, p) for each, p in zip(tallies, corrected, strict=True)]


def build_judge_groups(verdicts: Sequence[JudgeVerdicts], rows: Sequence[VerdictRow]) -> list[SectionGroup]:
    """Parts of the section: a table for every judge, the agreement of several, and notes."""
    labels = label_judges(verdicts)
    show_seed = len({one.seed for one in verdicts}) > 1
    tables = [_build_judge_group(judge, name, verdicts, rows, show_seed) for judge, name in labels.items()]
    if agreed := _list_agreement_rows(verdicts, labels, show_seed):
        headings = ["judges", "arms", "prompts", "agreement beyond chance"]
        note = "Cohen's kappa of every two judges, and Krippendorff's alpha of all with its 95% interval."
        tables.append(SectionGroup("Agreement of judges", table=Table(headings, agreed, [note])))
    corrected = f", corrected for all {len(rows)} rows (Holm)" if len(rows) > 1 else ""
    p = f"p: of no difference, by the sign test of wins against defeats{corrected}."
    intervals = (
        "Intervals: 95% over prompts at one seed, Wilson's for shares, Agresti and Min's (2005) for win − lose; other "
        "seeds may differ."
    )
    return [*tables, SectionGroup(notes=[*NOTES, p, intervals])]


def label_judges(verdicts: Sequence[JudgeVerdicts]) -> dict[Judge, str]:
    """Labels by judge: its model, and the settings that differ from other judges of the same model."""
    judges = list(dict.fromkeys(one.judge for one in verdicts))
    labels = {}
    for judge in judges:
        twins = [asdict(one) for one in judges if one.model == judge.model]
        settings = [f"{key} {value}" for key, value in asdict(judge).items() if len({twin[key] for twin in twins}) > 1]
        labels[judge] = ", ".join([judge.model, *(text.replace("_", " ", 1) for text in settings)])
    return labels


def _build_judge_group(
    judge: Judge, label: str, verdicts: Sequence[JudgeVerdicts], rows: Sequence[VerdictRow], show_seed: bool
) -> SectionGroup:
    """A judge's table of win, tie and lose and of its biases, with notes on its settings and special prompts."""
    headings = ["arms", "prompts", *SHARE_HEADINGS, "flips", "flips to the first", "longer wins", "win at equal length"]
    lines = []
    for row in rows:
        if row.judged.judge == judge:
            counts, arms = row.tally, _name_compared_arms(row.judged, show_seed)
            biases = (counts.flips, counts.first, counts.longer)
            lines.append(
                [
                    arms if row.category is None else f"{arms}: {row.category}",
                    *format_share_cells(counts, row.p),
                    *("" if bias is None else format_interval(bias) for bias in biases),
                    format_estimate(counts.equal_length),
                ]
            )
    temperature, limit = "the model's default temperature", "no limit on the length of replies"
    if judge.temperature is not None:
        temperature = f"temperature {judge.temperature:g}"
    if judge.reply_tokens is not None:
        limit = f"at most {judge.reply_tokens} tokens per reply"
    notes = [
        f"Endpoint {judge.endpoint}, {temperature}, {limit}, template {judge.template}.",
        *(
            note
            for one in verdicts
            if one.judge == judge and (note := _note_prompts_without_own_verdict(one, show_seed))
        ),
    ]
    return SectionGroup(label, table=Table(headings, lines) if lines else None, notes=notes)


def format_share_cells(shares: PreferenceShares, corrected_p: float) -> list[str]:
    """Table cells of the number of prompts, the shares won, tied and lost, win minus lose, and p."""
    intervals = (shares.win, shares.tie, shares.lose, shares.difference)
    return [str(shares.prompts), *map(format_interval, intervals), format_p_value(corrected_p)]


def _name_compared_arms(verdicts: JudgeVerdicts, show_seed: bool) -> str:
    """`mpo vs ppo`, or `mpo vs ppo, seed 0`."""
    return f"{verdicts.arms[0]} vs {verdicts.arms[1]}" + (f", seed {verdicts.seed}" if show_seed else "")


def _note_prompts_without_own_verdict(verdicts: JudgeVerdicts, show_seed: bool) -> str:
    """A note that counts prompts with identical texts, without verdict, or changed after judging; empty if none."""
    same, stale = sum(each.pair.is_identical for each in verdicts.verdicts), verdicts.stale
    unparsed = sum(each.unparsed for each in verdicts.verdicts)
    open_ = sum(each.outcome is None for each in verdicts.verdicts) - unparsed
    part = ", counted in proportion to the other prompts with a verdict" if unparsed or open_ else ""
    reasons = {
        f"the same text on {format_count(same, 'prompt')}, counted as a tie without a request{part}": same,
        f"no verdict on {format_count(unparsed, 'prompt')}, because a reply could not be parsed": unparsed,
        f"no reply yet on {format_count(open_, 'prompt')}": open_,
        f"{format_count(stale, 'prompt')} excluded, because the completions changed after judging": stale,
    }
    texts = [text for text, count in reasons.items() if count]
    return f"{_name_compared_arms(verdicts, show_seed)}: {'; '.join(texts)}." if texts else ""


def _list_agreement_rows(
    verdicts: Sequence[JudgeVerdicts], labels: dict[Judge, str], show_seed: bool
) -> list[list[str]]:
    """Table rows of Cohen's kappa of two judges and Krippendorff's alpha of all, where several judged the same arms."""
    rows = []
    for pair in dict.fromkeys((one.arms, one.seed) for one in verdicts):
        both = [one for one in verdicts if (one.arms, one.seed) == pair]
        if len(both) < 2:
            continue
        agreed, arms = compute_judge_agreement(both), _name_compared_arms(both[0], show_seed)
        for one, other, count, kappa in agreed.kappas:
            estimate = format_estimate(Interval(kappa, math.nan, math.nan))
            rows.append([f"{labels[one]} and {labels[other]}", arms, str(count), estimate])
        rows.append([f"all {len(both)}", arms, str(agreed.pairs), format_estimate(agreed.alpha)])
    return rows


def _summarize_verdicts(results: Results, verdicts: Sequence[JudgeVerdicts], rows: Sequence[VerdictRow]) -> str:
    """Sentences on the verdicts of at most three judges on the two compared arms, or on why there are none."""
    whole = [row for row in rows if row.category is None]
    stale = sum(one.stale for one in verdicts)
    if not whole:
        if not stale:
            return "No reply of the judges could be read as a verdict."
        return (
            f"No verdicts on the current completions: those of {format_count(stale, 'prompt')} changed after judging."
        )
    pair = choose_headline_arms(results)
    first = next((row for row in whole if row.judged.arms == pair), whole[0]).judged
    shown = [row for row in whole if (row.judged.arms, row.judged.seed) == (first.arms, first.seed)]
    labels, (one, other) = label_judges(verdicts), first.arms
    sentences = []
    for row in shown[:3]:
        counts = row.tally
        flips = "" if counts.flips is None else f"; {counts.flips.mean:.0%} of the verdicts flip with the order"
        flips += "" if counts.first is None else f", {counts.first.mean:.0%} of these to the completion shown first"
        sentences.append(
            f"{labels[row.judged.judge]} prefers {one} on {counts.win.mean:.0%} of "
            f"{format_count(counts.prompts, 'prompt')} and {other} on {counts.lose.mean:.0%}: "
            f"{describe_difference('win rate', one, other, counts.difference, row.p)}{flips}."
        )
    if len(shown) > 3:
        sentences.append(f"The other judges are {format_first_names([labels[row.judged.judge] for row in shown[3:]])}.")
    if stale:
        sentences.append(
            f"{format_count(stale, 'prompt')} are excluded, because the completions changed after judging."
        )
    return " ".join(sentences)
