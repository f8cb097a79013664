"""Theorem 1 and Corollary 1 of the paper (Feng et al. 2024), measured on the run's DPO models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_estimate, crossed_interval, share_interval, student_estimate
from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.comparison import find_significant_sign, format_interval, format_number
from mixpo.report.document import Group, Section, Table
from mixpo.stages.rows import read_table

TITLE = "Theorem 1, Corollary 1 and Remark 1"

Values = Float64[np.ndarray, " pairs"]


@dataclass(frozen=True)
class GradientMeasurement:
    """The gradients of a DPO model on the easy or the hard pairs, over all seeds."""

    arm: str
    part: str
    folders: Mapping[int, Path]
    """Folder of the measurement, by seed."""

    @cached_property
    def columns(self) -> dict[str, Values]:
        """The columns of `gradients.parquet`, all seeds one after the other."""
        rows = [row for seed in self.folders for row in self._rows_by_seed[seed]]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}

    @cached_property
    def _rows_by_seed(self) -> dict[int, list[dict[str, float]]]:
        return {seed: read_table(folder / "gradients.parquet") for seed, folder in self.folders.items()}

    def by_seed(self, values: Values) -> dict[int, Values]:
        """The values of a column, split by seed."""
        ends = np.cumsum([len(rows) for rows in self._rows_by_seed.values()])
        return dict(zip(self._rows_by_seed, np.split(values, ends[:-1]), strict=True))

    @property
    def log_ratio(self) -> Values:
        """log(x_l / x_w), from the log-probs."""
        return np.asarray(self.columns["log_x_rejected"] - self.columns["log_x_chosen"])

    @property
    def log_gradient_ratio(self) -> Values:
        """log |dL/dx_w| / |dL/dx_l|, by automatic differentiation."""
        return np.asarray(np.log(np.abs(self.columns["by_chosen"])) - np.log(np.abs(self.columns["by_rejected"])))

    @property
    def cosine(self) -> Values:
        """Cosine between the gradients of the two completions' log-probs, over all weights."""
        norms = np.sqrt(self.columns["chosen_chosen"] * self.columns["rejected_rejected"])
        return np.asarray(self.columns["chosen_rejected"] / norms)

    @property
    def remaining_norm(self) -> Values:
        """|g_w - g_l| / (|g_w| + |g_l|): norm of DPO's gradient relative to its two parts, 0 if they cancel."""
        one, other, both = (self.columns[n] for n in ("chosen_chosen", "rejected_rejected", "chosen_rejected"))
        return np.asarray(np.sqrt(np.maximum(one + other - 2 * both, 0.0)) / (np.sqrt(one) + np.sqrt(other)))

    @property
    def log_step_ratio(self) -> Values:
        """log of the increase of x_w over the decrease of x_l in a small step; nan where one has the opposite sign."""
        one, other, both = (self.columns[n] for n in ("chosen_chosen", "rejected_rejected", "chosen_rejected"))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.log(one - both) - np.log(other - both) - self.log_ratio)

    @property
    def moves_both_as_intended(self) -> Values:
        """1 where a small step raises the chosen log-prob and lowers the rejected one."""
        return np.asarray(np.isfinite(self.log_step_ratio), np.float64)


def build_theorem_section(results: Results) -> Section | None:
    """The section with the ratios of Corollary 1, and the cancellation of gradients on easy and hard pairs."""
    measured = load_measurements(results)
    failures = [f"{what}: {why}" for what, why in list_failures(results)]
    if not measured:
        group = Group(notes=failures)
        return Section("theorem", TITLE, "No gradients could be measured.", [group]) if failures else None
    rows = []
    for one in measured:
        moved = np.isfinite(one.log_step_ratio)
        log_prob_ratio = one.log_step_ratio[moved] + one.log_ratio[moved]
        rows.append(
            [
                one.arm,
                one.part,
                f"{len(one.folders)}",
                f"{len(one.log_ratio)}",
                f"{np.exp(np.median(one.log_ratio)):.2g}",
                f"{np.abs(one.log_gradient_ratio - one.log_ratio).max():.0e}",
                format_interval(average_over_pairs(list(one.by_seed(one.cosine).values()))),
                format_interval(average_over_pairs(list(one.by_seed(one.remaining_norm).values()))),
                _format_share(list(one.by_seed(one.moves_both_as_intended).values())),
                f"{np.exp(np.median(log_prob_ratio)):.2f}" if len(log_prob_ratio) else "",
            ]
        )
    headings = [
        "DPO trained on",
        "measured on",
        "seeds",
        "pairs",
        "median x_l / x_w",
        "largest error of Corollary 1 (log)",
        "cosine of the two gradients",
        "relative norm of DPO's gradient",
        "a step raises chosen and lowers rejected",
        "median rise / fall of log-probs",
    ]
    notes = [
        "x = pi / pi_ref. Corollary 1: |dL/dx_w| / |dL/dx_l| = x_l / x_w; the error is the largest difference between "
        "the two logarithms, with gradients by automatic differentiation of the training loss. The corollary is about "
        "the loss as a function of x_w and x_l. The effect of a step on the two completions also depends on the angle "
        "between their gradients over the weights, which the other columns measure for a small step, to first order.",
        _describe_step(measured),
        "Remark 1: DPO learns poorly from hard pairs because the two gradients cancel: a large cosine and a small "
        "relative norm.",
        "Intervals: Student's, over the pairs of one seed or the means of several seeds; Wilson's for the share, "
        "widened by the variance between seeds.",
        *failures,
    ]
    ratios = figures.plot_scatter(
        {
            f"{one.arm} on {one.part}": list(zip(one.log_ratio.tolist(), one.log_gradient_ratio.tolist(), strict=True))
            for one in measured
        },
        name="corollary-1",
        x="log(x_l / x_w)",
        y="log of the measured gradient ratio",
    )
    steps = figures.plot_scatter(
        {
            f"{one.arm} on {one.part}": [
                (x, y)
                for x, y in zip(one.log_ratio.tolist(), one.log_step_ratio.tolist(), strict=True)
                if math.isfinite(y)
            ]
            for one in measured
        },
        name="corollary-1-step",
        x="log(x_l / x_w)",
        y="log(increase of x_w / decrease of x_l) in a step",
    )
    cosines = figures.plot_grouped_intervals(
        {
            arm: [
                figures.Point(
                    one.part, figures.exact_interval(0.0), average_over_pairs(list(one.by_seed(one.cosine).values()))
                )
                for one in measured
                if one.arm == arm
            ]
            for arm in dict.fromkeys(one.arm for one in measured)
        },
        name="remark-1",
        y="cosine of the two gradients",
    )
    return Section(
        "theorem",
        TITLE,
        _write_opening(measured),
        [Group(figures=[ratios, *([steps] if steps.rows else []), cosines], table=Table(headings, rows, notes))],
    )


def list_failures(results: Results) -> list[tuple[str, str]]:
    """The gradients that could not be measured, and the reasons."""
    return [
        (f"gradients of {results.qualify_name(run, one.arm)} on {one.part} pairs (seed {one.seed})", one.reason)
        for run in results.runs
        for one in run.gradients
        if one.reason
    ]


def load_measurements(results: Results) -> list[GradientMeasurement]:
    """The gradient measurements of every DPO model on easy and on hard pairs."""
    folders: dict[tuple[str, str], dict[int, Path]] = {}
    for run in results.runs:
        for one in run.gradients:
            if one.folder:
                folders.setdefault((results.qualify_name(run, one.arm), one.part), {})[one.seed] = Path(one.folder)
    return [GradientMeasurement(arm, part, places) for (arm, part), places in folders.items()]


def average_over_pairs(by_seed: Sequence[Values]) -> Interval:
    """The mean over seeds of means over pairs, with Student's interval over the pairs of one seed or over seeds."""
    if len(by_seed) == 1:
        return crossed_interval(by_seed[0][None])
    return crossed_interval(np.array([[values.mean()] for values in by_seed]))


def _format_share(by_seed: Sequence[Values]) -> str:
    share = share_interval([float(values.sum()) for values in by_seed], [len(values) for values in by_seed])
    return f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"


def _correlate_step(measured: list[GradientMeasurement]) -> tuple[float, int] | None:
    """Correlation of log(increase of x_w / decrease of x_l) in a step with log(x_l / x_w), and its number of pairs."""
    x, y = (np.concatenate([getattr(one, name) for one in measured]) for name in ("log_ratio", "log_step_ratio"))
    moved = np.isfinite(y)
    if moved.sum() < 3 or not x[moved].std() or not y[moved].std():
        return None
    return float(np.corrcoef(x[moved], y[moved])[0, 1]), int(moved.sum())


def _describe_step(measured: list[GradientMeasurement]) -> str:
    """A sentence on the correlation of a step's effect with Corollary 1."""
    estimate = _correlate_step(measured)
    if estimate is None:
        return "Too few pairs have a step that raises chosen and lowers rejected for a correlation with x_l / x_w."
    correlation, pairs = estimate
    return (
        f"A step in the weights changes x by x times the change in log-prob. Over {pairs} pairs whose step raises "
        "chosen and lowers rejected, log(increase of x_w / decrease of x_l) has a correlation of "
        f"{format_number(correlation)} with log(x_l / x_w)."
    )


def _write_opening(measured: list[GradientMeasurement]) -> str:
    error = max(float(np.abs(one.log_gradient_ratio - one.log_ratio).max()) for one in measured)
    ratios = np.concatenate([one.log_ratio for one in measured])
    text = (
        f"Corollary 1 is an identity and holds: on {len(ratios)} measurements with x_l / x_w from "
        f"{np.exp(ratios.min()):.2g} to {np.exp(ratios.max()):.2g}, the measured gradient ratio differs by at most "
        f"{error:.0e} in its logarithm"
    )
    if (estimate := _correlate_step(measured)) is not None:
        text += (
            "; in a small step of the weights, however, log(increase of x_w / decrease of x_l) has a correlation of "
            f"{format_number(estimate[0])} with log(x_l / x_w)"
        )
    easy, hard = average_cosines(measured)
    if not easy:
        return f"{text}."
    difference, p = compare_means(hard, easy)
    verdicts = {1: "significant, as Remark 1 says", -1: "significant, against Remark 1", 0: "not significant"}
    verdict = verdicts[find_significant_sign(difference, p)]
    one, other = (float(np.mean([values.mean() for values in part])) for part in (easy, hard))
    sample = "pairs at one seed" if len(easy) == 1 else f"{len(easy)} seeds"
    return (
        f"{text}; the cosine between the gradients of chosen and rejected is {format_number(one)} on easy and "
        f"{format_number(other)} on hard pairs, a difference of {format_interval(difference)} (95% interval over "
        f"{sample}){f', {verdict}' if math.isfinite(difference.low) else ', without an interval'}."
    )


def average_cosines(measured: Sequence[GradientMeasurement]) -> tuple[list[Values], list[Values]]:
    """The cosines of easy and of hard pairs by seed, averaged over the models that were measured on both.

    The models are measured on the same pairs, so each pair counts once.
    """
    found = {(one.arm, one.part): one.by_seed(one.cosine) for one in measured}
    arms, seeds = dict.fromkeys(one.arm for one in measured), sorted({seed for one in measured for seed in one.folders})
    easy, hard = list[Values](), list[Values]()
    for seed in seeds:
        own = [
            (found[arm, "easy"][seed], found[arm, "hard"][seed])
            for arm in arms
            if all(seed in found.get((arm, part), {}) for part in ("easy", "hard"))
        ]
        if own:
            easy.append(np.mean([one for one, _ in own], axis=0))
            hard.append(np.mean([other for _, other in own], axis=0))
    return easy, hard


def compare_means(one: Sequence[Values], other: Sequence[Values]) -> tuple[Interval, float]:
    """The difference of two means with its interval and p, over the pairs of one seed or over several seeds."""
    if len(one) > 1:
        return crossed_estimate(np.array([[a.mean() - b.mean()] for a, b in zip(one, other, strict=True)]))
    parts = [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in (one[0], other[0]) if len(part) > 1]
    if len(parts) < 2:
        parts = [(0.0, 1)]
    return student_estimate(float(one[0].mean() - other[0].mean()), parts)
