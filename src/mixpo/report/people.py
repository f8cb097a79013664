"""Blind studies with people: wins, ties and losses, the agreement of annotators, and the work of each."""

import math
from collections.abc import Mapping

from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import Results
from mixpo.report.comparison import NOT_ESTIMABLE, describe_difference, format_count, format_estimate, format_interval
from mixpo.report.document import Group, Section, Table
from mixpo.report.judges import SHARE_HEADINGS, format_shares
from mixpo.study.findings import StudyFindings, load_study_findings
from mixpo.study.plan import are_completions_unchanged

ALL = "all prompts"


def build_people_section(results: Results) -> Section | None:
    """The section with the closed studies of the runs; None where no run has one.

    A study whose completions have changed since is excluded.
    """
    sentences, groups = list[str](), list[Group]()
    for run in results.runs:
        if (found := load_study_findings(run.folder)) is None:
            continue
        name = f"{run.name}: " if len(results.runs) > 1 else ""
        arms = results.qualify_arm_name(run, found.arms[0]), results.qualify_arm_name(run, found.arms[1])
        drawn = {"seed": found.seed, "prompt_count": found.prompts, "draw_seed": found.draw}
        if are_completions_unchanged(results, arms, **drawn, content_digest=found.content):
            sentences.append(name + describe_study(found))
            groups += [Group(name + title, table=table) for title, table in build_tables(found).items()]
        else:
            sentences.append(
                f"{name}The study closed at {found.closed} is excluded: the completions have changed since."
            )
    return Section("people", "People", " ".join(sentences), groups) if sentences else None


def describe_study(found: StudyFindings) -> str:
    """A study's result in one or two sentences."""
    one, other = found.arms
    if not found.annotators_with_judgements:
        return f"Nobody judged a prompt of {one} and {other} before the study was closed."
    shares, agreement = found.shares[None], found.agreement[None]
    people = (
        "One person"
        if len(found.annotators_with_judgements) == 1
        else f"{len(found.annotators_with_judgements)} people"
    )
    p = _correct_p_values(found)[None]
    difference = describe_difference("win rate", one, other, shares.difference, p)
    kappa = f"Fleiss' κ {format_estimate(agreement.kappa)}"
    if not math.isnan(agreement.kappa.mean):
        kappa += f" over {format_count(agreement.common, 'prompt')}"
    return (
        f"{people} judged blindly and preferred {one} on {shares.win.mean:.0%} of "
        f"{format_count(shares.prompts, 'prompt')} and {other} on {shares.lose.mean:.0%}, with "
        f"{shares.tie.mean:.0%} ties: {difference}. {kappa}."
    )


def build_tables(found: StudyFindings) -> Mapping[str, Table]:
    """The tables of a study by title."""
    return {
        "Preferences": _build_shares_table(found),
        "Agreement": _build_agreement_table(found),
        "Annotators": _build_annotators_table(found),
    }


def _correct_p_values(found: StudyFindings) -> dict[str | None, float]:
    """The p of every category, corrected for their number."""
    return dict(zip(found.shares, correct_by_holm([each.p for each in found.shares.values()]), strict=True))


def _build_shares_table(found: StudyFindings) -> Table:
    corrected = _correct_p_values(found)
    rows = [[name or ALL, *format_shares(each, corrected[name])] for name, each in found.shares.items()]
    notes = [
        f"Win: {found.arms[0]} was preferred to {found.arms[1]}, at seed {found.seed}; a prompt counts as the mean "
        "over its annotators. Intervals: 95% over prompts, Wilson's for shares, Agresti and Min's (2005) for win − "
        "lose; other annotators or seeds may differ.",
        "p: of no difference, by the sign test of prompts won against prompts lost"
        + (", corrected for all rows (Holm)." if len(rows) > 1 else "."),
    ]
    if found.same:
        notes.append(
            f"{format_count(found.same, 'prompt')} with the same completion of both arms, a tie without judgements."
        )
    return Table(["prompts", "number", *SHARE_HEADINGS], rows, notes)


def _build_agreement_table(found: StudyFindings) -> Table:
    rows = [
        [
            name or ALL,
            format_estimate(each.kappa),
            str(each.common),
            format_estimate(each.alpha),
            format_estimate(each.pairs),
            str(each.several),
        ]
        for name, each in found.agreement.items()
    ]
    notes = [
        "κ: over prompts that every annotator judged; α and pairs: over prompts that two or more judged. "
        f"{NOT_ESTIMABLE.capitalize()}: too few judgements, or all the same."
    ]
    if found.annotators_without_judgements:
        notes.append(f"Excluded, without judgements: {', '.join(found.annotators_without_judgements)}.")
    return Table(["prompts", "Fleiss' κ", "of", "Krippendorff's α", "pairs agree", "of"], rows, notes)


def _build_annotators_table(found: StudyFindings) -> Table:
    rows = [
        [
            one.name,
            f"{one.judged} of {one.questions}",
            str(one.skipped),
            "" if one.seconds is None else f"{one.seconds:.0f} s",
            str(one.idle),
            "" if one.left is None else format_interval(one.left),
        ]
        for one in found.annotators
    ]
    note = (
        "Idle: judgements of more than ten minutes, counted as ten. Left side: share of preferences for the left "
        "completion, without ties; both arms stand there equally often, so 0.50 shows no position bias (95% intervals, "
        "Wilson)."
    )
    return Table(["annotator", "judged", "skipped", "median time", "idle", "left side"], rows, [note])
