"""Does the reward model know its business? Accuracy, accuracy by gap (Figure 2 of the paper), calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.calibration import bin_calibration, calibration_error
from mixpo.algorithms.intervals import Interval, share_interval
from mixpo.experiments.results import Results, StageFolder, stages_by_seed
from mixpo.report import figures
from mixpo.report.document import Group, Section, Table
from mixpo.stages.rows import read_table

CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)


def section(results: Results) -> Section | None:
    """Every reward model of the runs, those of the first run's recipe in pictures, all seeds together."""
    stages = results.stages_of("RewardModel")
    if not stages:
        return None
    rows = []
    for stage in stages:
        for part in ("validation", "test"):
            judged = stage.summary[part]
            spread = f"{judged['score_mean']:.2f} ± {judged['score_std']:.2f}"
            error = calibration_error(bin_calibration(margins(stage, part), CONFIDENCE_EDGES))
            under = f"{judged['gap_under_1']:.0%}"
            rows.append([stage.label, part, f"{judged['pairs']:,}", accuracy(judged), under, f"{error:.3f}", spread])
    headings = [
        "reward model",
        "pairs of",
        "count",
        "accuracy",
        "gap under 1",
        "calibration error",
        "score (mean ± sd)",
    ]
    drawn = stages_by_seed(stages)
    one = len(drawn) == 1
    pictures = [
        figures.shares(
            pooled_shares([stage.summary[part]["by_gap"] for stage in drawn]),
            name=f"accuracy-by-gap-{part}",
            title=f"{part} pairs",
            x="gap between the two scores",
            y="ordered as labelled",
            each={} if one else {stage.label: pooled_shares([stage.summary[part]["by_gap"]]) for stage in drawn},
        )
        for part in ("validation", "test")
    ]
    tested = {stage.label: margins(stage, "test") for stage in drawn}
    pictures.append(
        figures.calibration(
            pooled_calibration(list(tested.values())),
            name="calibration",
            title="calibration on test pairs",
            each={} if one else {label: pooled_calibration([own]) for label, own in tested.items()},
        )
    )
    whose = (
        f"Of {drawn[0].label}, with Wilson 95% intervals"
        if one
        else f"Bold: the pairs of {len(drawn)} seeds together; thin: each seed's. Wilson 95% intervals, of one seed's "
        "mean count in a bin, since all seeds judge the same test pairs, and wider by what the seeds differ in"
    )
    notes = [
        f"{whose}; n is the number of pairs in the bin, dotted is chance. "
        "Calibration holds sigma(gap), which the model takes for the probability of its order, against the share that "
        "is ordered so; its error is the mean distance of the two, weighted by count.",
        "The paper: 73% on HH-RLHF, 78% on TL;DR; over half of its pairs have a gap under 1 (Figure 2).",
    ]
    alarms = [f"Alarm, {stage.label}: {alarm}." for stage in stages for alarm in stage.summary.get("alarms", ())]
    groups = [
        Group(table=Table(headings, rows), notes=alarms),
        Group("Accuracy by gap, and calibration", pictures, notes=notes),
    ]
    return Section("reward-model", "Reward model", _opening(results, stages, drawn), groups)


def margins(stage: StageFolder, part: str) -> Float64[np.ndarray, " pairs"]:
    """Score of chosen minus score of rejected of the `validation` or the `test` pairs."""
    rows = read_table(stage.folder / f"{part}_scores.parquet")
    return np.array([row["chosen_score"] - row["rejected_score"] for row in rows], dtype=np.float64)


def accuracy(judged: Mapping[str, Any]) -> str:
    """`73% [70%, 76%]`."""
    low, high = judged["accuracy_interval"]
    return f"{judged['accuracy']:.0%} [{low:.0%}, {high:.0%}]"


def pooled_shares(by_gap: Sequence[Sequence[Mapping[str, Any]]]) -> list[figures.Share]:
    """The bins of several seeds together."""
    found = []
    for bins in zip(*by_gap, strict=True):
        counts = [one["count"] for one in bins]
        right = [one["count"] * one["interval"]["mean"] if one["interval"] else 0.0 for one in bins]
        low, high = bins[0]["low"], bins[0]["high"]
        label = f"≥{low:g}" if high is None else f"{low:g}–{high:g}"
        found.append(figures.Share(label, sum(counts), share_interval(right, counts) if any(counts) else None))
    return found


def pooled_calibration(margins: Sequence[Float64[np.ndarray, " pairs"]]) -> list[figures.Bin]:
    """The filled bins of the pairs of several seeds together."""
    found = []
    for bins in zip(*(bin_calibration(own, CONFIDENCE_EDGES) for own in margins), strict=True):
        counts = [one.count for one in bins]
        if any(counts):
            predicted = sum(one.count * (one.predicted or 0.0) for one in bins) / sum(counts)
            right = [one.count * (one.observed or 0.0) for one in bins]
            found.append((predicted, share_interval(right, counts), sum(counts)))
    return found


def _opening(results: Results, stages: list[StageFolder], drawn: list[StageFolder]) -> str:
    test = [margins(stage, "test") for stage in drawn]
    under = float(np.mean([np.abs(one) < 1 for one in test]))
    interval = share_interval([float((one > 0).sum()) for one in test], [one.size for one in test])
    many = f"over pairs and {len(test)} seeds" if len(test) > 1 else "over pairs at one seed"
    said = f"[{interval.low:.0%}, {interval.high:.0%}] of {test[0].size:,} test pairs as labelled (95% interval {many})"
    which = f" of {stages[0].run.name}" if len(results.runs) > 1 else ""
    return (
        f"The reward model{which} orders {interval.mean:.0%} {said}, "
        f"{_chance(interval)}; {under:.0%} of them have a gap under 1."
    )


def _chance(interval: Interval) -> str:
    if interval.low > 0.5:
        return "which is above chance"
    return "which is below chance" if interval.high < 0.5 else "which is not told apart from chance"
