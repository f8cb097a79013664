"""What did selection do? The gaps and where they are cut, sizes, right and wrong labels, pairs from both ends."""

from collections.abc import Sequence
from typing import Any

from mixpo.algorithms.intervals import wilson_interval
from mixpo.data.world import true_reward
from mixpo.experiments.results import Results, StageFolder, stages_by_seed
from mixpo.report import figures
from mixpo.report.document import Group, Section, Table
from mixpo.stages.rows import read_table

SHOWN = 3
"""Pairs from each end."""


def section(results: Results) -> Section | None:
    """Every selection of the runs, those of the first run's recipe in a picture, all seeds together."""
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
    shown = stages_by_seed(stages)
    picture = figures.histogram(
        {part: [float(row["gap"]) for stage in shown for row in parts[stage.key][part]] for part in ("hard", "easy")},
        cuts=[stage.summary["threshold"] for stage in shown],
        name="gaps",
        x="gap between the two scores",
    )
    first = shown[0]
    rows_of_first = sorted(parts[first.key]["easy"] + parts[first.key]["hard"], key=lambda row: float(row["gap"]))
    which = first.label if len(shown) == 1 else f"{len(shown)} seeds together"
    notes = ["Identical: both completions are the same, so the gap is 0."]
    if known:
        notes.append(
            "A label is right if the chosen completion has the higher true r*; pairs that r* ties are left out of the "
            "share and counted behind it. Brackets: Wilson 95% intervals."
        )
    groups = [
        Group(table=Table(headings, rows, notes)),
        Group(f"Gaps ({which})", [picture]),
        Group(f"Pairs from both ends ({first.label})", table=_examples(rows_of_first, known=known)),
    ]
    opening = _opening(shown, [samples[stage.key] for stage in shown], [parts[stage.key] for stage in shown], known)
    return Section("selection", "Selection", opening, groups)


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


def _opening(
    drawn: list[StageFolder], samples: list[StageFolder], parts: list[dict[str, list[dict[str, Any]]]], known: bool
) -> str:
    """What the selections did, as ranges over their seeds."""
    summaries = [stage.summary for stage in drawn]
    where = f"({drawn[0].label})" if len(drawn) == 1 else f"at each of {len(drawn)} seeds"
    easy = [one["easy"] / one["pairs"] for one in summaries]
    said = (
        f"Of {_range([one['pairs'] for one in summaries], ',')} pairs sampled from SFT {where}, "
        f"{_range([one['easy'] for one in summaries], ',')} ({_range(easy, '.0%')}) have a gap above "
        f"{_range([one['threshold'] for one in summaries], '.3g')} and are easy; the median gap is "
        f"{_range([one.summary['gap_median'] for one in samples], '.2f')}"
    )
    if not known:
        return f"{said}."
    right = {part: [share for one in parts for share in _share(one[part])] for part in ("easy", "hard")}
    told = [f"{_range(shares, '.0%') if shares else 'none of none'} of the {part}" for part, shares in right.items()]
    return f"{said}. Of the labels that the true r* does not tie, {told[0]} and {told[1]} are right."


def _share(rows: list[dict[str, Any]]) -> list[float]:
    """The share of labels that the true reward calls right, if it calls any right or wrong."""
    right, wrong, _ = _tally(rows)
    return [right / (right + wrong)] if right + wrong else []


def _range(values: Sequence[float], form: str) -> str:
    """`5`, or `4 to 6` where they are not all the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
