"""Blind studies with people: wins, ties and losses, the agreement of annotators, and the work of each."""

import math
from collections.abc import Mapping

from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import Results
from mixpo.report.comparison import NOT_ESTIMABLE, describe_difference, format_count, format_estimate, format_interval
from mixpo.report.document import Section, SectionGroup, Table
from mixpo.report.judges import SHARE_HEADINGS, format_share_cells
from mixpo.study.findings import StudyFindings, load_study_findings
from mixpo.study.plan import are_completions_unchanged

ALL = "all prompts"


def build_human_study_section(results: Results) -> Section | None:
    """The section with the runs' closed studies, without those of changed completions; None where no run has one."""
    sentences, groups = list[str](), list[SectionGroup]()
    for run in results.runs:
        if (findings := load_study_findings(run.folder)) is None:
            continue
        name = f"{run.name}: " if len(results.runs) > 1 else ""
        arms = results.qualify_arm_name(run, findings.arms[0]), results.qualify_arm_name(run, findings.arms[1])
        comparison = {"seed": findings.seed, "prompt_count": findings.prompts, "draw_seed": findings.draw}
        if are_completions_unchanged(results, arms, **comparison, content_digest=findings.content):
            sentences.append(name + describe_study(findings))
            groups += [SectionGroup(name + title, table=table) for title, table in build_study_tables(findings).items()]
        else:
            sentences.append(
                f"{name}The study closed at {findings.closed} is excluded: the completions have changed since."
            )
    return Section("people", "People", " ".join(sentences), groups) if sentences else None


def describe_study(findings: StudyFindings) -> str:
    """A study's preferences, their significance and Fleiss' kappa in one or two sentences."""
    one, other = findings.arms
    judges = len(findings.annotators_with_judgements)
    if not judges:
        return f"Nobody judged a prompt of {one} and {other} before the study was closed."
    shares, agreement = findings.shares[None], findings.agreement[None]
    people = "One person" if judges == 1 else f"{judges} people"
    p = _correct_p_by_category(findings)[None]
    difference = describe_difference("win rate", one, other, shares.difference, p)
    kappa = f"Fleiss' κ {format_estimate(agreement.kappa)}"
    if not math.isnan(agreement.kappa.mean):
        kappa += f" over {format_count(agreement.common, 'prompt')}"
    return (
        f"{people} judged blindly and preferred {one} on {shares.win.mean:.0%} of "
        f"{format_count(shares.prompts, 'prompt')} and {other} on {shares.lose.mean:.0%}, with "
        f"{shares.tie.mean:.0%} ties: {difference}. {kappa}."
    )


def build_study_tables(findings: StudyFindings) -> Mapping[str, Table]:
    """A study's tables of preferences, agreement and annotators, by title."""
    return {
        "Preferences": _build_preferences_table(findings),
        "Agreement": _build_agreement_table(findings),
        "Annotators": _build_annotators_table(findings),
    }


def _correct_p_by_category(findings: StudyFindings) -> dict[str | None, float]:
    """The p of every category, and of all prompts (None), corrected for their number."""
    return dict(zip(findings.shares, correct_by_holm([each.p for each in findings.shares.values()]), strict=True))


def _build_preferences_table(findings: StudyFindings) -> Table:
    """A row for all prompts and for every category: shares won, tied and lost, and p."""
    corrected = _correct_p_by_category(findings)
    rows = [[name or ALL, *format_share_cells(each, corrected[name])] for name, each in findings.shares.items()]
    notes = [
        f"Win: {findings.arms[0]} was preferred to {findings.arms[1]}, at seed {findings.seed}; a prompt counts as the "
        "mean over its annotators. Intervals: 95% over prompts, Wilson's for shares, Agresti and Min's (2005) for win "
        "− lose; other annotators or seeds may differ.",
        "p: of no difference, by the sign test of prompts won against prompts lost"
        + (", corrected for all rows (Holm)." if len(rows) > 1 else "."),
    ]
    if findings.same:
        notes.append(
            f"{format_count(findings.same, 'prompt')} with the same completion of both arms, a tie without judgements."
        )
    return Table(["prompts", "number", *SHARE_HEADINGS], rows, notes)


def _build_agreement_table(findings: StudyFindings) -> Table:
    """A row for all prompts and for every category: Fleiss' kappa, Krippendorff's alpha, pairs that agree."""
    rows = []
    for name, each in findings.agreement.items():
        kappa, alpha, pairs = map(format_estimate, (each.kappa, each.alpha, each.pairs))
        rows.append([name or ALL, kappa, str(each.common), alpha, pairs, str(each.several)])
    notes = [
        "κ: over prompts that every annotator judged; α and pairs: over prompts that two or more judged. "
        f"{NOT_ESTIMABLE.capitalize()}: too few judgements, or all the same."
    ]
    if findings.annotators_without_judgements:
        notes.append(f"Excluded, without judgements: {', '.join(findings.annotators_without_judgements)}.")
    return Table(["prompts", "Fleiss' κ", "of", "Krippendorff's α", "pairs agree", "of"], rows, notes)


def _build_annotators_table(findings: StudyFindings) -> Table:
    """A row for every annotator: prompts judged and skipped, median time, share of the left side."""
    rows = []
    for one in findings.annotators:
        seconds = "" if one.seconds is None else f"{one.seconds:.0f} s"
        left = "" if one.left is None else format_interval(one.left)
        rows.append([one.name, f"{one.judged} of {one.questions}", str(one.skipped), seconds, str(one.idle), left])
    note = (
        "Idle: judgements of more than ten minutes, counted as ten. Left side: share of preferences for the left "
        "completion, without ties; both arms stand there equally often, so 0.50 shows no position bias (95% intervals, "
        "Wilson)."
    )
    return Table(["annotator", "judged", "skipped", "median time", "idle", "left side"], rows, [note])
