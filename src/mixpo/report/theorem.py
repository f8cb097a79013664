"""Theorem 1 and Corollary 1 of the paper (Feng et al. 2024), measured on the DPO models of the run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.statistics import Interval, bootstrap_mean, wilson_interval
from mixpo.report import figures
from mixpo.report.comparison import interval_text
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import Results
from mixpo.stages.rows import read_table

Values = Float64[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Measured:
    """A DPO model's gradients on a part of the pairs, all seeds together."""

    arm: str
    part: str
    folders: tuple[Path, ...]

    @cached_property
    def columns(self) -> dict[str, Values]:
        """The columns of `gradients.parquet`."""
        rows = [row for folder in self.folders for row in read_table(folder / "gradients.parquet")]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}

    @property
    def log_ratio(self) -> Values:
        """log(x_l / x_w), by the log-probs."""
        return np.asarray(self.columns["log_x_rejected"] - self.columns["log_x_chosen"])

    @property
    def log_gradient_ratio(self) -> Values:
        """log |dL/dx_w| / |dL/dx_l|, by automatic differentiation."""
        return np.asarray(np.log(np.abs(self.columns["by_chosen"])) - np.log(np.abs(self.columns["by_rejected"])))

    @property
    def cosine(self) -> Values:
        """Of the angle between the gradients, over all weights, of the two completions' log-probs."""
        norms = np.sqrt(self.columns["chosen_chosen"] * self.columns["rejected_rejected"])
        return np.asarray(self.columns["chosen_rejected"] / norms)

    @property
    def left(self) -> Values:
        """|g_w - g_l| / (|g_w| + |g_l|): what is left of the two gradients in DPO's, 0 if they cancel."""
        one, other, both = (self.columns[n] for n in ("chosen_chosen", "rejected_rejected", "chosen_rejected"))
        return np.asarray(np.sqrt(np.maximum(one + other - 2 * both, 0.0)) / (np.sqrt(one) + np.sqrt(other)))

    @property
    def log_step_ratio(self) -> Values:
        """log of the increase of x_w over the decrease of x_l in a small step; nan where one goes the other way."""
        one, other, both = (self.columns[n] for n in ("chosen_chosen", "rejected_rejected", "chosen_rejected"))
        with np.errstate(invalid="ignore", divide="ignore"):
            up, down = np.log(one - both), np.log(other - both)
        return np.asarray(up - down - self.log_ratio)

    @property
    def both_ways(self) -> Values:
        """1 where a small step raises the chosen log-prob and lowers the rejected one."""
        return np.asarray(np.isfinite(self.log_step_ratio), np.float64)


def section(results: Results) -> Section | None:
    """The ratios, and how far the two gradients cancel on easy and on hard pairs."""
    measured, failed = _measured(results)
    if not measured:
        return None
    rows = []
    for one in measured:
        together = one.both_ways
        agree = one.log_step_ratio[np.isfinite(one.log_step_ratio)] + one.log_ratio[np.isfinite(one.log_step_ratio)]
        share = wilson_interval(int(together.sum()), len(together))
        rows.append(
            [
                one.arm,
                one.part,
                f"{len(one.log_ratio)}",
                f"{np.exp(np.median(one.log_ratio)):.2g}",
                f"{np.abs(one.log_gradient_ratio - one.log_ratio).max():.0e}",
                interval_text(bootstrap_mean(one.cosine)),
                interval_text(bootstrap_mean(one.left)),
                f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]",
                f"{np.exp(np.median(agree)):.2f}" if len(agree) else "",
            ]
        )
    headings = [
        "DPO trained on",
        "measured on",
        "pairs",
        "median x_l / x_w",
        "largest error of Corollary 1 (log)",
        "cosine of the two gradients",
        "left of them in DPO's",
        "a step raises chosen and lowers rejected",
        "median rise / fall of log-probs",
    ]
    notes = [
        "x = pi / pi_ref. Corollary 1: |dL/dx_w| / |dL/dx_l| = x_l / x_w; the error is the largest difference of the "
        "two logarithms, the gradients by automatic differentiation of the loss that trains. It is a statement about "
        "the loss as a function of x_w and x_l; what a step does to the two completions also depends on how their "
        "gradients over the weights lie to each other, which the other columns measure: for a small step, to first "
        "order.",
        "Remark 1: DPO learns badly from hard pairs because the two gradients counteract each other, which is a large "
        "cosine and little left of them.",
        *failed,
    ]
    picture = figures.scatter(
        {
            f"{one.arm} on {one.part}": list(zip(one.log_ratio.tolist(), one.log_gradient_ratio.tolist(), strict=True))
            for one in measured
        },
        name="corollary-1",
        x="log(x_l / x_w)",
        y="log of the measured gradient ratio",
    )
    cosines = figures.dots(
        {
            arm: [
                figures.Point(one.part, figures.exactly(0.0), bootstrap_mean(one.cosine))
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
        "Theorem 1 and Remark 1",
        _opening(measured),
        [Group(figures=[picture, cosines], table=Table(headings, rows, notes))],
    )


def _measured(results: Results) -> tuple[list[Measured], list[str]]:
    ones = [one for run in results.runs for one in run.gradients]
    failed = [f"{one.arm} on {one.part} pairs failed at seed {one.seed}: {one.reason}" for one in ones if one.reason]
    folders: dict[tuple[str, str], list[Path]] = {}
    for one in ones:
        if one.folder:
            folders.setdefault((one.arm, one.part), []).append(Path(one.folder))
    return [Measured(arm, part, tuple(places)) for (arm, part), places in folders.items()], failed


def _opening(measured: list[Measured]) -> str:
    error = max(float(np.abs(one.log_gradient_ratio - one.log_ratio).max()) for one in measured)
    ratios = np.concatenate([one.log_ratio for one in measured])
    said = (
        f"On {len(ratios)} measurements x_l / x_w runs from {np.exp(ratios.min()):.1g} to {np.exp(ratios.max()):.1g} "
        f"and the measured gradient ratio agrees with it to {error:.0e} (log)"
    )
    easy, hard = (np.concatenate([one.cosine for one in measured if one.part == part]) for part in ("easy", "hard"))
    if not len(easy) or not len(hard):
        return f"{said}."
    difference = _apart(hard, easy)
    word = (
        "as Remark 1 has it"
        if difference.low > 0
        else "against Remark 1"
        if difference.high < 0
        else "which does not tell them apart"
    )
    return (
        f"{said}; the cosine between the gradients of chosen and rejected is {easy.mean():.2f} on easy and "
        f"{hard.mean():.2f} on hard pairs, a difference of {interval_text(difference)}, {word}."
    )


def _apart(one: Values, other: Values) -> Interval:
    """The difference of two means of unlike pairs, by resampling each."""
    draw = np.random.default_rng(0)
    again = [values[draw.integers(len(values), size=(4000, len(values)))].mean(axis=1) for values in (one, other)]
    low, high = np.quantile(again[0] - again[1], [0.025, 0.975])
    return Interval(float(one.mean() - other.mean()), float(low), float(high))
