"""What did selection do? The gaps and where they are cut, sizes, right and wrong labels, pairs from both ends."""

from typing import Any

from mixpo.algorithms.statistics import wilson_interval
from mixpo.data.world import true_reward
from mixpo.report import figures
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import Results, StageFolder
from mixpo.stages.rows import read_table

SHOWN = 3
"""Pairs from each end."""


def section(results: Results) -> Section | None:
    """Every selection of the runs, the first in pictures."""
    stages = results.stages_of("Selection")
    if not stages:
        return None
    parts = {
        stage.key: {part: read_table(stage.folder / f"{part}.parquet") for part in ("easy", "hard")} for stage in stages
    }
    samples = {stage.key: _samples_of(results, stage) for stage in stages}
    headings = ["selection", "pairs", "easy", "hard", "identical", "threshold", "median gap", "median gap / score sd"]
    known = all(stage.run.is_world for stage in stages)
    if known:
        headings += ["easy labels right", "hard labels right"]
    rows = []
    for stage in stages:
        summary, drawn = stage.summary, samples[stage.key].summary
        row = [stage.label, *(f"{summary[key]:,}" for key in ("pairs", "easy", "hard")), f"{drawn['identical']:,}"]
        row += [f"{summary['threshold']:.3g}", f"{drawn['gap_median']:.3g}"]
        row.append(f"{drawn['gap_median'] / drawn['score_std']:.2f}" if drawn["score_std"] else "")
        rows.append(row + ([_right(parts[stage.key][part]) for part in ("easy", "hard")] if known else []))
    first = stages[0]
    rows_of_first = sorted(parts[first.key]["easy"] + parts[first.key]["hard"], key=lambda row: float(row["gap"]))
    picture = figures.histogram(
        [float(row["gap"]) for row in rows_of_first],
        cut=first.summary["threshold"],
        name="gaps",
        x="gap between the two scores",
        left="hard",
        right="easy",
    )
    notes = ["Identical: both completions are the same, so the gap is 0."]
    if known:
        notes.append(
            "A label is right if the chosen completion has the higher true r*; pairs that r* ties are left out of the "
            "share and counted behind it. Brackets: Wilson 95% intervals."
        )
    groups = [
        Group(table=Table(headings, rows, notes)),
        Group(f"Gaps ({first.label})", [picture]),
        Group(f"Pairs from both ends ({first.label})", table=_examples(rows_of_first, known=known)),
    ]
    return Section("selection", "Selection", _opening(first, samples[first.key], parts[first.key], known), groups)


def _samples_of(results: Results, selection: StageFolder) -> StageFolder:
    """The samples that a selection splits: an arm stands on those of its selection, and on no others."""
    keys = next(arm.stages for arm in results.arms if selection.key in arm.stages)
    return next(stage for stage in results.stages_of("Samples") if stage.key in keys)


def _tally(rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Labels that the true reward calls right, wrong, and those that it ties."""
    right = wrong = 0
    for row in rows:
        chosen, rejected = _true_rewards(row)
        right, wrong = right + (chosen > rejected), wrong + (chosen < rejected)
    return right, wrong, len(rows) - right - wrong


def _true_rewards(row: dict[str, Any]) -> tuple[float, float]:
    chosen, rejected = (true_reward(_asked(row), text) for text in row["completions"])
    return chosen, rejected


def _asked(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _right(rows: list[dict[str, Any]]) -> str:
    right, wrong, tied = _tally(rows)
    if not right + wrong:
        return f"none ({tied} tied)"
    share = wilson_interval(right, right + wrong)
    return f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}] ({tied} tied)"


def _examples(rows: list[dict[str, Any]], *, known: bool) -> Table:
    """The pairs with the largest gaps, and some with the smallest that are not identical."""
    different = [row for row in rows if row["tokens"][0] != row["tokens"][1]]
    largest = different[SHOWN:][-SHOWN:]
    body = []
    for row in [*reversed(largest), *different[:SHOWN]]:
        scores = [f"{score:+.2f}" for score in row["scores"]]
        if known:
            scores = [f"{score} (r* {true:+.1f})" for score, true in zip(scores, _true_rewards(row), strict=True)]
        texts = [text for pair in zip(row["completions"], scores, strict=True) for text in pair]
        body.append([f"{row['gap']:.2f}", _asked(row), *texts])
    return Table(["gap", "prompt", "chosen", "its score", "rejected", "its score"], body)


def _opening(first: StageFolder, samples: StageFolder, parts: dict[str, list[dict[str, Any]]], known: bool) -> str:
    summary = first.summary
    said = (
        f"Of {summary['pairs']:,} pairs sampled from SFT ({first.label}), {summary['easy']:,} "
        f"({summary['easy'] / summary['pairs']:.0%}) have a gap above {summary['threshold']:.3g} and are easy; the "
        f"median gap is {samples.summary['gap_median']:.2f}"
    )
    if not known:
        return f"{said}."
    easy, hard = (_tally(parts[part]) for part in ("easy", "hard"))
    return (
        f"{said}. Of the labels that the true r* does not tie, {_plain_share(easy)} of the easy and "
        f"{_plain_share(hard)} of the hard are right."
    )


def _plain_share(tally: tuple[int, int, int]) -> str:
    right, wrong, _ = tally
    return f"{right / (right + wrong):.0%}" if right + wrong else "none of none"
