"""Does the reward model know its business? Accuracy, accuracy by gap (Figure 2 of the paper), calibration."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.statistics import Interval, calibration, calibration_error, crossed_interval
from mixpo.report import figures
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import Results, StageFolder
from mixpo.stages.rows import read_table

CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)


def section(results: Results) -> Section | None:
    """Every reward model of the runs, the first in pictures."""
    stages = results.stages_of("RewardModel")
    if not stages:
        return None
    first = stages[0]
    rows = []
    for stage in stages:
        for part in ("validation", "test"):
            judged = stage.summary[part]
            spread = f"{judged['score_mean']:.2f} ± {judged['score_std']:.2f}"
            error = calibration_error(calibration(margins(stage, part), CONFIDENCE_EDGES))
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
    pictures = []
    for part in ("validation", "test"):
        bins = [_bin(one) for one in first.summary[part]["by_gap"]]
        pictures.append(
            figures.shares(
                bins,
                name=f"accuracy-by-gap-{part}",
                title=f"{part} pairs",
                x="gap between the two scores",
                y="ordered as labelled",
            )
        )
    found = calibration(margins(first, "test"), CONFIDENCE_EDGES)
    drawn = [
        (one.predicted, one.interval, one.count)
        for one in found
        if one.predicted is not None and one.interval is not None
    ]
    pictures.append(figures.calibration(drawn, name="calibration", title="calibration on test pairs"))
    notes = [
        f"Of {first.label}, with Wilson 95% intervals; n is the number of pairs in the bin, dotted is chance. "
        "Calibration holds sigma(gap), which the model takes for the probability of its order, against the share that "
        "is ordered so; its error is the mean distance of the two, weighted by count.",
        "The paper: 73% on HH-RLHF, 78% on TL;DR; over half of its pairs have a gap under 1 (Figure 2).",
    ]
    alarms = [f"Alarm, {stage.label}: {alarm}." for stage in stages for alarm in stage.summary.get("alarms", ())]
    groups = [
        Group(table=Table(headings, rows), notes=alarms),
        Group("Accuracy by gap, and calibration", pictures, notes=notes),
    ]
    return Section("reward-model", "Reward model", _opening(results, stages), groups)


def margins(stage: StageFolder, part: str) -> Float64[np.ndarray, " pairs"]:
    """Score of chosen minus score of rejected of the `validation` or the `test` pairs."""
    rows = read_table(stage.folder / f"{part}_scores.parquet")
    return np.array([row["chosen_score"] - row["rejected_score"] for row in rows], dtype=np.float64)


def accuracy(judged: Mapping[str, Any]) -> str:
    """`73% [70%, 76%]`."""
    low, high = judged["accuracy_interval"]
    return f"{judged['accuracy']:.0%} [{low:.0%}, {high:.0%}]"


def _opening(results: Results, stages: list[StageFolder]) -> str:
    by_seed: dict[int, StageFolder] = {}
    for stage in stages:
        if stage.plain and stage.run is stages[0].run:
            by_seed.setdefault(stage.seeds[0], stage)
    test = [margins(stage, "test") for stage in by_seed.values()]
    under = float(np.mean([np.abs(one) < 1 for one in test]))
    interval = crossed_interval(np.stack([one > 0 for one in test]).astype(np.float64))
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


def _bin(one: Mapping[str, Any]) -> figures.Share:
    label = f"≥{one['low']:g}" if one["high"] is None else f"{one['low']:g}–{one['high']:g}"
    return figures.Share(label, one["count"], Interval(**one["interval"]) if one["interval"] else None)
