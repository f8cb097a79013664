"""The reward model's accuracy, accuracy by gap (Figure 2 of the paper) and calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.calibration import bin_calibration, calibration_error
from mixpo.algorithms.intervals import Interval, wilson_interval_over_seeds
from mixpo.experiments.results import Results, StageResult, select_unswept_stage_per_seed
from mixpo.report import figures
from mixpo.report.comparison import format_interval, format_number
from mixpo.report.document import Section, SectionGroup, Table
from mixpo.stages.rows import read_table

Margins = Float64[np.ndarray, " pairs"]
"""Score of chosen minus score of rejected."""
CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)


def build_reward_model_section(results: Results) -> Section | None:
    """The section with every reward model's accuracy, and figures by gap and of calibration; None without a model."""
    stages = results.list_stages_of_kind("RewardModel")
    if not stages:
        return None
    rows = []
    for stage in stages:
        for part in ("validation", "test"):
            judged = stage.summary[part]
            error = calibration_error(bin_calibration(load_margins(stage, part), CONFIDENCE_EDGES))
            rows.append(
                {
                    "reward model": stage.label,
                    "pairs of": part,
                    "count": f"{judged['pairs']:,}",
                    "accuracy": format_interval(Interval(judged["accuracy"], *judged["accuracy_interval"]), ".0%"),
                    "gap under 1": f"{judged['gap_under_1']:.0%}",
                    "calibration error": f"{error:.3f}",
                    "score (mean ± sd)": f"{format_number(judged['score_mean'])} ± {judged['score_std']:.2f}",
                }
            )
    shown = select_unswept_stage_per_seed(stages)
    each = shown if len(shown) > 1 else []
    plots = []
    for part in ("validation", "test"):
        by_gap = {stage.label: stage.summary[part]["by_gap"] for stage in shown}
        plots.append(
            figures.plot_shares_by_bin(
                pool_accuracy_by_gap(list(by_gap.values())),
                {stage.label: pool_accuracy_by_gap([by_gap[stage.label]]) for stage in each},
                name=f"accuracy-by-gap-{part}",
                title=f"{part} pairs",
                xlabel="gap between the two scores",
                ylabel="ordered as labelled",
            )
        )
    tested = {stage.label: load_margins(stage, "test") for stage in shown}
    plots.append(
        figures.plot_calibration(
            pool_calibration(list(tested.values())),
            {stage.label: pool_calibration([tested[stage.label]]) for stage in each},
            name="calibration",
            title="calibration on test pairs",
        )
    )
    intervals = (
        f"{shown[0].label.capitalize()}, with Wilson 95% intervals"
        if not each
        else f"Bold: {len(shown)} seeds together; thin: each seed. Wilson 95% intervals for one seed's mean count in a "
        "bin, since all seeds have the same test pairs, widened by the variance between seeds"
    )
    notes = [
        f"{intervals}; n is the number of pairs in the bin; the dotted line is chance. "
        "Calibration compares sigma(gap), the model's probability of its own order, with the share of pairs in that "
        "order; its error is their mean absolute difference, weighted by count.",
        "The paper: 73% on HH-RLHF, 78% on TL;DR; over half of its pairs have a gap under 1 (Figure 2).",
    ]
    alarms = [f"Alarm, {stage.label}: {alarm}." for stage in stages for alarm in stage.summary.get("alarms", ())]
    groups = [
        SectionGroup(table=Table.from_row_dicts(rows), notes=alarms),
        SectionGroup("Accuracy by gap, and calibration", plots, notes=notes),
    ]
    return Section("reward-model", "Reward model", _summarize_accuracy(results, stages, list(tested.values())), groups)


def load_margins(stage: StageResult, split: str) -> Margins:
    """Score of chosen minus score of rejected, an array over the reward model's `validation` or `test` pairs."""
    rows = read_table(stage.folder / f"{split}_scores.parquet")
    return np.array([row["chosen_score"] - row["rejected_score"] for row in rows], dtype=np.float64)


def pool_accuracy_by_gap(bins_by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> list[figures.BinShare]:
    """A bin for every range of score gaps: the share of pairs ordered as labelled, over several seeds together."""
    pooled = []
    for bins in zip(*bins_by_seed, strict=True):
        counts = [one["count"] for one in bins]
        right = [one["count"] * one["interval"]["mean"] if one["interval"] else 0.0 for one in bins]
        low, high = bins[0]["low"], bins[0]["high"]
        label = f"≥{low:g}" if high is None else f"{low:g}–{high:g}"
        share = wilson_interval_over_seeds(right, counts) if any(counts) else None
        pooled.append(figures.BinShare(label, sum(counts), share))
    return pooled


def pool_calibration(margins_by_seed: Sequence[Margins]) -> list[figures.Bin]:
    """Non-empty bins of predicted confidence: the share of pairs in the model's order, over several seeds together."""
    pooled = []
    for bins in zip(*(bin_calibration(values, CONFIDENCE_EDGES) for values in margins_by_seed), strict=True):
        counts = [one.count for one in bins]
        if any(counts):
            predicted = sum(one.count * (one.predicted or 0.0) for one in bins) / sum(counts)
            right = [one.count * (one.observed or 0.0) for one in bins]
            pooled.append((predicted, wilson_interval_over_seeds(right, counts), sum(counts)))
    return pooled


def _summarize_accuracy(results: Results, stages: list[StageResult], margins: Sequence[Margins]) -> str:
    """A sentence on the share of test pairs ordered as labelled, its significance against chance, and small gaps."""
    under = float(np.mean([np.abs(one) < 1 for one in margins]))
    interval = wilson_interval_over_seeds([float((one > 0).sum()) for one in margins], [one.size for one in margins])
    sample = f"over pairs and {len(margins)} seeds" if len(margins) > 1 else "over pairs at one seed"
    model = f"The reward model{f' of {stages[0].run.name}' if len(results.runs) > 1 else ''}"
    verdict = "not significantly different from chance"
    if interval.low > 0.5 or interval.high < 0.5:
        verdict = f"significantly {'above' if interval.low > 0.5 else 'below'} chance"
    return (
        f"{model} agrees with {interval.mean:.0%} of the labels of {margins[0].size:,} test pairs (95% CI "
        f"[{interval.low:.0%}, {interval.high:.0%}] {sample}), {verdict}; {under:.0%} of the pairs have a gap under 1."
    )
