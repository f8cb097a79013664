"""What do people say? Win, tie and lose in blind studies, how far the annotators agree, and what each of them did."""

import math
from collections.abc import Mapping

from mixpo.algorithms.statistics import Interval
from mixpo.experiments.results import Results
from mixpo.report.comparison import counted, interval_text
from mixpo.report.document import Group, Section, Table
from mixpo.study.findings import Findings, findings

UNKNOWN = "cannot be told"


def section(results: Results) -> Section | None:
    """The closed studies of the runs; None where no run has one."""
    found = {run.name: told for run in results.runs if (told := findings(run.folder)) is not None}
    if not found:
        return None
    several = len(results.runs) > 1
    groups = [
        Group(f"{name}: {title}" if several else title, table=table)
        for name, told in found.items()
        for title, table in tables(told).items()
    ]
    said = [f"{name}: {opening(told)}" if several else opening(told) for name, told in found.items()]
    return Section("people", "People", " ".join(said), groups)


def opening(found: Findings) -> str:
    """What a study says, in a sentence or two; nothing that its intervals do not hold."""
    one, other = found.arms
    if not found.counted:
        return f"Nobody judged a prompt of {one} and {other} before the study was closed."
    shares, agreement = found.shares["all"], found.agreement["all"]
    people = "one person" if len(found.counted) == 1 else f"{len(found.counted)} people"
    margin = shares.margin
    if math.isnan(margin.low):
        verdict = "of one prompt, which has no interval"
    else:
        verdict = (
            "above zero" if margin.low > 0 else "below zero" if margin.high < 0 else "which does not tell the two apart"
        )
    kappa = f"Fleiss' κ {_number(agreement.kappa)}"
    if not math.isnan(agreement.kappa.mean):
        kappa += f" over {counted(agreement.common, 'prompt')}"
    return (
        f"{people[0].upper()}{people[1:]}, who did not know which was which, preferred {one} to {other} at "
        f"{shares.win.mean:.1%} of {counted(shares.prompts, 'prompt')}, called {shares.tie.mean:.1%} a tie, and "
        f"preferred {other} at {shares.lose.mean:.1%}: win minus lose {_share(margin, sign=True)}, {verdict}. {kappa}."
    )


def tables(found: Findings) -> Mapping[str, Table]:
    """The tables of a study by title."""
    return {
        "What people prefer": _shares(found),
        "How far they agree": _agreement(found),
        "The annotators": _annotators(found),
    }


def _shares(found: Findings) -> Table:
    one, other = found.arms
    rows = [
        [
            name,
            str(each.prompts),
            _share(each.win),
            _share(each.tie),
            _share(each.lose),
            _share(each.margin, sign=True),
        ]
        for name, each in found.shares.items()
    ]
    notes = [
        f"Win: {one} was preferred to {other}. A prompt is the mean over those who judged it; 95% intervals over "
        "prompts (bootstrap), which say nothing of other annotators or seeds."
    ]
    if found.same:
        notes.append(f"{counted(found.same, 'prompt')} that both arms completed alike: a tie that nobody was asked.")
    return Table(["prompts", "number", "win", "tie", "lose", "win − lose"], rows, notes)


def _agreement(found: Findings) -> Table:
    rows = [
        [
            name,
            _number(each.kappa),
            str(each.common),
            _number(each.alpha),
            UNKNOWN if math.isnan(each.pairs) else f"{each.pairs:.1%}",
            str(each.several),
        ]
        for name, each in found.agreement.items()
    ]
    notes = [
        "κ is of the prompts that every annotator judged; α and the agreement of pairs of all that two or more judged. "
        f"{UNKNOWN.capitalize()}: too few judgements, or all alike, so that chance alone makes them agree."
    ]
    if found.left_out:
        notes.append(f"Left out, having judged nothing: {', '.join(found.left_out)}.")
    return Table(["prompts", "Fleiss' κ", "of", "Krippendorff's α", "pairs agree", "of"], rows, notes)


def _annotators(found: Findings) -> Table:
    rows = [
        [
            one.name,
            f"{one.judged} of {one.questions}",
            str(one.skipped),
            "" if one.seconds is None else f"{one.seconds:.0f} s",
            str(one.idle),
            "" if one.left is None else _share(one.left),
        ]
        for one in found.annotators
    ]
    return Table(
        ["annotator", "judged", "skipped", "median time", "idle", "left side"],
        rows,
        [
            "Idle: judgements that took more than ten minutes; they count as ten. Left side: how often, ties left out; "
            "each arm stood there half of the time, so far from 50% is a habit (95% intervals, Wilson)."
        ],
    )


def _number(interval: Interval) -> str:
    return UNKNOWN if math.isnan(interval.mean) else interval_text(interval)


def _share(interval: Interval, *, sign: bool = False) -> str:
    """`62.0% [48.0%, 76.0%]`, or of a difference `+43.3% [21.0%, 64.1%]`."""
    mean = f"{interval.mean:+.1%}" if sign else f"{interval.mean:.1%}"
    return mean if math.isnan(interval.low) else f"{mean} [{interval.low:.1%}, {interval.high:.1%}]"
