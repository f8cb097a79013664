"""What do people say? Win, tie and lose in blind studies, how far the annotators agree, and what each of them did."""

import math
from collections.abc import Mapping

from mixpo.algorithms.intervals import Interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import Results
from mixpo.report.comparison import UNTOLD, counted, interval_text, p_text, verdict
from mixpo.report.document import Group, Section, Table
from mixpo.study.findings import Findings, load_findings
from mixpo.study.plan import are_completions_unchanged

ALL = "all prompts"


def section(results: Results) -> Section | None:
    """The closed studies of the runs; None where no run has one. A study of what a run was before is left out."""
    said, groups = list[str](), list[Group]()
    for run in results.runs:
        if (found := load_findings(run.folder)) is None:
            continue
        name = f"{run.name}: " if len(results.runs) > 1 else ""
        arms = results.named(run, found.arms[0]), results.named(run, found.arms[1])
        drawn = {"seed": found.seed, "prompts": found.prompts, "draw": found.draw}
        if are_completions_unchanged(results, arms, **drawn, content=found.content):
            said.append(name + opening(found))
            groups += [Group(name + title, table=table) for title, table in tables(found).items()]
        else:
            said.append(f"{name}The study closed at {found.closed} is left out: the completions have changed since.")
    return Section("people", "People", " ".join(said), groups) if said else None


def opening(found: Findings) -> str:
    """What a study says, in a sentence or two; nothing that its intervals do not hold."""
    one, other = found.arms
    if not found.active_annotators:
        return f"Nobody judged a prompt of {one} and {other} before the study was closed."
    shares, agreement = found.shares[None], found.agreement[None]
    people = "one person" if len(found.active_annotators) == 1 else f"{len(found.active_annotators)} people"
    difference = verdict(shares.difference, _corrected(found)[None])
    kappa = f"Fleiss' κ {_number(agreement.kappa)}"
    if not math.isnan(agreement.kappa.mean):
        kappa += f" over {counted(agreement.common, 'prompt')}"
    return (
        f"{people[0].upper()}{people[1:]}, who did not know which was which, preferred {one} to {other} on "
        f"{shares.win.mean:.0%} of {counted(shares.prompts, 'prompt')}, called {shares.tie.mean:.0%} a tie, and "
        f"preferred {other} on {shares.lose.mean:.0%}: difference {difference}. {kappa}."
    )


def tables(found: Findings) -> Mapping[str, Table]:
    """The tables of a study by title."""
    return {
        "What people prefer": _shares(found),
        "How far they agree": _agreement(found),
        "The annotators": _annotators(found),
    }


def _corrected(found: Findings) -> dict[str | None, float]:
    """The p of every row, corrected for their number."""
    return dict(zip(found.shares, correct_by_holm([each.p for each in found.shares.values()]), strict=True))


def _shares(found: Findings) -> Table:
    corrected = _corrected(found)
    rows = [
        [
            name or ALL,
            str(each.prompts),
            *map(interval_text, (each.win, each.tie, each.lose, each.difference)),
            p_text(corrected[name]),
        ]
        for name, each in found.shares.items()
    ]
    notes = [
        f"Win: {found.arms[0]} was preferred to {found.arms[1]}, at seed {found.seed}. A prompt is the mean over those "
        "who judged it. Intervals are 95%, over prompts, and say nothing of other annotators or seeds: Wilson's of "
        "shares, Agresti and Min's (2005) of win − lose.",
        "p: of no difference, by the sign test of prompts won against prompts lost"
        + (", corrected for all rows (Holm)." if len(rows) > 1 else "."),
    ]
    if found.same:
        notes.append(f"{counted(found.same, 'prompt')} that both arms completed alike: a tie that nobody was asked.")
    return Table(["prompts", "number", "win", "tie", "lose", "win − lose", "p"], rows, notes)


def _agreement(found: Findings) -> Table:
    rows = [
        [
            name or ALL,
            _number(each.kappa),
            str(each.common),
            _number(each.alpha),
            _number(each.pairs),
            str(each.several),
        ]
        for name, each in found.agreement.items()
    ]
    notes = [
        "κ is of the prompts that every annotator judged; α and the agreement of pairs of all that two or more judged. "
        f"{UNTOLD.capitalize()}: too few judgements, or all alike, so that chance alone makes them agree."
    ]
    if found.inactive_annotators:
        notes.append(f"Left out, having judged nothing: {', '.join(found.inactive_annotators)}.")
    return Table(["prompts", "Fleiss' κ", "of", "Krippendorff's α", "pairs agree", "of"], rows, notes)


def _annotators(found: Findings) -> Table:
    rows = [
        [
            one.name,
            f"{one.judged} of {one.questions}",
            str(one.skipped),
            "" if one.seconds is None else f"{one.seconds:.0f} s",
            str(one.idle),
            "" if one.left is None else interval_text(one.left),
        ]
        for one in found.annotators
    ]
    return Table(
        ["annotator", "judged", "skipped", "median time", "idle", "left side"],
        rows,
        [
            "Idle: judgements that took more than ten minutes; they count as ten. Left side: how often, ties left out; "
            "each arm stood there half of the time, so far from 0.50 is a habit (95% intervals, Wilson)."
        ],
    )


def _number(interval: Interval) -> str:
    return UNTOLD if math.isnan(interval.mean) else interval_text(interval)
