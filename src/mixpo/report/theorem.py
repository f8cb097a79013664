"""Theorem 1 and Corollary 1 of the paper (Feng et al. 2024), measured on the run's DPO models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64

from mixpo.algorithms.intervals import (
    Interval,
    compute_crossed_mean_interval,
    estimate_crossed_mean,
    estimate_from_variance_components,
    wilson_interval_over_seeds,
)
from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.comparison import find_significant_sign, format_interval, format_number
from mixpo.report.document import Section, SectionGroup, Table
from mixpo.stages.rows import read_table

TITLE = "Theorem 1, Corollary 1 and Remark 1"

Values = Float64[np.ndarray, " pairs"]


@dataclass(frozen=True)
class PairGradientStatistics:
    """Statistics of DPO's gradients on each easy or hard pair of an arm's DPO model, seeds concatenated."""

    arm: str
    part: str
    folders: Mapping[int, Path]
    """Folder of the measurement, by seed."""

    @cached_property
    def columns(self) -> dict[str, Values]:
        """Arrays of the columns of `gradients.parquet` by name, all seeds one after the other."""
        rows = [row for seed in self.folders for row in self._read_rows_by_seed[seed]]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}

    @cached_property
    def _read_rows_by_seed(self) -> dict[int, list[dict[str, float]]]:
        return {seed: read_table(folder / "gradients.parquet") for seed, folder in self.folders.items()}

    @property
    def _gradient_inner_products(self) -> tuple[Values, Values, Values]:
        """Inner products of the two gradients: chosen with itself, rejected with itself, chosen with rejected."""
        columns = self.columns
        return columns["chosen_chosen"], columns["rejected_rejected"], columns["chosen_rejected"]

    def split_by_seed(self, values: Values) -> dict[int, Values]:
        """The parts of an array over all seeds, by seed."""
        ends = np.cumsum([len(rows) for rows in self._read_rows_by_seed.values()])
        return dict(zip(self._read_rows_by_seed, np.split(values, ends[:-1]), strict=True))

    def average_over_seeds(self, values: Values) -> Interval:
        """The mean over seeds of means over pairs, with 95% interval over the pairs of one seed or over seeds."""
        by_seed = list(self.split_by_seed(values).values())
        if len(by_seed) == 1:
            return compute_crossed_mean_interval(by_seed[0][None])
        return compute_crossed_mean_interval(np.array([[part.mean()] for part in by_seed]))

    @property
    def log_x_ratio(self) -> Values:
        """log(x_l / x_w) of each pair, x = pi / pi_ref of the rejected (l) and the chosen (w) completion."""
        return np.asarray(self.columns["log_x_rejected"] - self.columns["log_x_chosen"])

    @property
    def log_gradient_ratio(self) -> Values:
        """log |dL/dx_w| / |dL/dx_l| of DPO's loss for each pair, by automatic differentiation."""
        return np.asarray(np.log(np.abs(self.columns["by_chosen"])) - np.log(np.abs(self.columns["by_rejected"])))

    @property
    def gradient_cosine(self) -> Values:
        """Cosine between the gradients of chosen's and rejected's log-probs over all weights, for each pair."""
        one, other, both = self._gradient_inner_products
        return np.asarray(both / np.sqrt(one * other))

    @property
    def relative_gradient_norm(self) -> Values:
        """|g_w - g_l| / (|g_w| + |g_l|): norm of DPO's gradient relative to its two parts, 0 if they cancel."""
        one, other, both = self._gradient_inner_products
        return np.asarray(np.sqrt(np.maximum(one + other - 2 * both, 0.0)) / (np.sqrt(one) + np.sqrt(other)))

    @property
    def log_step_ratio(self) -> Values:
        """log of the increase of x_w over the decrease of x_l in a small step; nan where one has the opposite sign."""
        one, other, both = self._gradient_inner_products
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.log(one - both) - np.log(other - both) - self.log_x_ratio)

    @property
    def moves_both_as_intended(self) -> Bool[np.ndarray, " pairs"]:
        """For each pair, True if a small step raises the chosen log-prob and lowers the rejected one."""
        return np.asarray(np.isfinite(self.log_step_ratio))


def build_theorem_section(results: Results) -> Section | None:
    """The section with Corollary 1's ratios and how far a pair's gradients cancel, easy and hard; None if not tried."""
    measurements = load_gradient_measurements(results)
    failures = [f"{what}: {why}" for what, why in list_failed_gradients(results)]
    if not measurements:
        group = SectionGroup(notes=failures)
        return Section("theorem", TITLE, "No gradients could be measured.", [group]) if failures else None
    rows, ratios, steps = [], {}, {}
    cosines: dict[str, list[figures.Point]] = {}
    for one in measurements:
        label, moved = f"{one.arm} on {one.part}", one.moves_both_as_intended
        cosine = one.average_over_seeds(one.gradient_cosine)
        by_seed = list(one.split_by_seed(moved).values())
        share = wilson_interval_over_seeds([float(part.sum()) for part in by_seed], [len(part) for part in by_seed])
        log_prob_ratio = (one.log_step_ratio + one.log_x_ratio)[moved]
        rows.append(
            {
                "DPO trained on": one.arm,
                "measured on": one.part,
                "seeds": f"{len(one.folders)}",
                "pairs": f"{len(one.log_x_ratio)}",
                "median x_l / x_w": f"{np.exp(np.median(one.log_x_ratio)):.2g}",
                "largest error of Corollary 1 (log)": f"{np.abs(one.log_gradient_ratio - one.log_x_ratio).max():.0e}",
                "cosine of the two gradients": format_interval(cosine),
                "relative norm of DPO's gradient": format_interval(one.average_over_seeds(one.relative_gradient_norm)),
                "a step raises chosen and lowers rejected": format_interval(share, ".0%"),
                "median rise / fall of log-probs": f"{np.exp(np.median(log_prob_ratio)):.2f}" if moved.any() else "",
            }
        )
        ratios[label] = list(zip(one.log_x_ratio.tolist(), one.log_gradient_ratio.tolist(), strict=True))
        steps[label] = list(zip(one.log_x_ratio[moved].tolist(), one.log_step_ratio[moved].tolist(), strict=True))
        point = figures.Point(one.part, figures.exact_interval(0.0), cosine)
        cosines.setdefault(one.arm, []).append(point)
    moved_x, moved_y = np.array([point for points in steps.values() for point in points]).reshape(-1, 2).T
    varied = len(moved_x) > 2 and moved_x.std() and moved_y.std()
    correlation = float(np.corrcoef(moved_x, moved_y)[0, 1]) if varied else None
    step = "Too few pairs have a step that raises chosen and lowers rejected for a correlation with x_l / x_w."
    if correlation is not None:
        step = (
            f"A step in the weights changes x by x times the change in log-prob. Over {len(moved_x)} "
            "pairs whose step raises chosen and lowers rejected, log(increase of x_w / decrease of x_l) has a "
            f"correlation of {format_number(correlation)} with log(x_l / x_w)."
        )
    notes = [
        "x = pi / pi_ref. Corollary 1: |dL/dx_w| / |dL/dx_l| = x_l / x_w; the error is the largest difference between "
        "the two logarithms, with gradients by automatic differentiation of the training loss. The corollary is about "
        "the loss as a function of x_w and x_l. The effect of a step on the two completions also depends on the angle "
        "between their gradients over the weights, which the other columns measure for a small step, to first order.",
        step,
        "Remark 1: DPO learns poorly from hard pairs because the two gradients cancel: a large cosine and a small "
        "relative norm.",
        "Intervals: Student's, over the pairs of one seed or the means of several seeds; Wilson's for the share, "
        "widened by the variance between seeds.",
        *failures,
    ]
    x, y = "log(x_l / x_w)", "log of the measured gradient ratio"
    plots = [figures.plot_scatter(ratios, name="corollary-1", xlabel=x, ylabel=y)]
    if any(steps.values()):
        y = "log(increase of x_w / decrease of x_l) in a step"
        plots.append(figures.plot_scatter(steps, name="corollary-1-step", xlabel=x, ylabel=y))
    plots.append(figures.plot_grouped_intervals(cosines, name="remark-1", ylabel="cosine of the two gradients"))
    group = SectionGroup(figures=plots, table=Table.from_row_dicts(rows, notes))
    return Section("theorem", TITLE, _summarize_gradients(measurements, correlation), [group])


def list_failed_gradients(results: Results) -> list[tuple[str, str]]:
    """(what, reason), both as text, of each gradient measurement that failed."""
    return [
        (f"gradients of {results.qualify_arm_name(run, one.arm)} on {one.part} pairs (seed {one.seed})", one.reason)
        for run in results.runs
        for one in run.gradients
        if one.reason
    ]


def load_gradient_measurements(results: Results) -> list[PairGradientStatistics]:
    """A measurement for every DPO model and part (easy or hard pairs), over its seeds."""
    folders: dict[tuple[str, str], dict[int, Path]] = {}
    for run in results.runs:
        for one in run.gradients:
            if one.folder:
                folders.setdefault((results.qualify_arm_name(run, one.arm), one.part), {})[one.seed] = Path(one.folder)
    return [PairGradientStatistics(arm, part, places) for (arm, part), places in folders.items()]


def _summarize_gradients(measurements: list[PairGradientStatistics], correlation: float | None) -> str:
    """Sentences on the error of Corollary 1, on the correlation, and on cosines of easy against hard pairs."""
    error = max(float(np.abs(one.log_gradient_ratio - one.log_x_ratio).max()) for one in measurements)
    ratios = np.concatenate([one.log_x_ratio for one in measurements])
    text = (
        f"Corollary 1 is an identity and holds: on {len(ratios)} measurements with x_l / x_w from "
        f"{np.exp(ratios.min()):.2g} to {np.exp(ratios.max()):.2g}, the measured gradient ratio differs by at most "
        f"{error:.0e} in its logarithm"
    )
    if correlation is not None:
        text += (
            "; in a small step of the weights, however, log(increase of x_w / decrease of x_l) has a correlation of "
            f"{format_number(correlation)} with log(x_l / x_w)"
        )
    easy, hard = average_cosines_over_models(measurements)
    if not easy:
        return f"{text}."
    difference, p = estimate_difference_of_means(hard, easy)
    verdicts = {1: "significant, as Remark 1 says", -1: "significant, against Remark 1", 0: "not significant"}
    verdict = verdicts[find_significant_sign(difference, p)]
    one, other = (float(np.mean([values.mean() for values in part])) for part in (easy, hard))
    sample = "pairs at one seed" if len(easy) == 1 else f"{len(easy)} seeds"
    return (
        f"{text}; the cosine between the gradients of chosen and rejected is {format_number(one)} on easy and "
        f"{format_number(other)} on hard pairs, a difference of {format_interval(difference)} (95% interval over "
        f"{sample}){f', {verdict}' if math.isfinite(difference.low) else ', without an interval'}."
    )


def average_cosines_over_models(measurements: Sequence[PairGradientStatistics]) -> tuple[list[Values], list[Values]]:
    """Cosines of easy and of hard pairs, an array a seed: means over the models measured on both, which share pairs."""
    cosines = {(one.arm, one.part): one.split_by_seed(one.gradient_cosine) for one in measurements}
    arms = dict.fromkeys(one.arm for one in measurements)
    seeds = sorted({seed for one in measurements for seed in one.folders})
    easy, hard = list[Values](), list[Values]()
    for seed in seeds:
        parts = [[cosines.get((arm, part), {}).get(seed) for part in ("easy", "hard")] for arm in arms]
        complete = [(one, other) for one, other in parts if one is not None and other is not None]
        if complete:
            easy.append(np.mean([one for one, _ in complete], axis=0))
            hard.append(np.mean([other for _, other in complete], axis=0))
    return easy, hard


def estimate_difference_of_means(first: Sequence[Values], second: Sequence[Values]) -> tuple[Interval, float]:
    """First mean minus second with its interval, and p, over the pairs of one seed or over several seeds."""
    if len(first) > 1:
        return estimate_crossed_mean(np.array([[a.mean() - b.mean()] for a, b in zip(first, second, strict=True)]))
    parts = [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in (first[0], second[0]) if len(part) > 1]
    if len(parts) < 2:
        parts = [(0.0, 1)]
    return estimate_from_variance_components(float(first[0].mean() - second[0].mean()), parts)
