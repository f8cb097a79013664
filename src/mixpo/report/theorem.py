"""Theorem 1 and Corollary 1 of the paper (Feng et al. 2024), measured on the DPO models of the run."""

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
from mixpo.report.comparison import interval_text, sign
from mixpo.report.document import Group, Section, Table
from mixpo.stages.rows import read_table

Values = Float64[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Measured:
    """A DPO model's gradients on a part of the pairs, all seeds together."""

    arm: str
    part: str
    folders: Mapping[int, Path]
    """By seed."""

    @cached_property
    def columns(self) -> dict[str, Values]:
        """The columns of `gradients.parquet`."""
        rows = [row for seed in self.folders for row in self._rows[seed]]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}

    @cached_property
    def _rows(self) -> dict[int, list[dict[str, float]]]:
        return {seed: read_table(folder / "gradients.parquet") for seed, folder in self.folders.items()}

    def by_seed(self, values: Values) -> dict[int, Values]:
        """A column's values, seed by seed."""
        ends = np.cumsum([len(rows) for rows in self._rows.values()])
        return dict(zip(self._rows, np.split(values, ends[:-1]), strict=True))

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
            return np.asarray(np.log(one - both) - np.log(other - both) - self.log_ratio)

    @property
    def both_ways(self) -> Values:
        """1 where a small step raises the chosen log-prob and lowers the rejected one."""
        return np.asarray(np.isfinite(self.log_step_ratio), np.float64)


def section(results: Results) -> Section | None:
    """The ratios, and how far the two gradients cancel on easy and on hard pairs."""
    measured, notes_of_failed = measurements(results), [f"{what}: {why}" for what, why in failed(results)]
    if not measured:
        said = "No gradients could be measured."
        group = Group(notes=notes_of_failed)
        return Section("theorem", "Theorem 1, Corollary 1 and Remark 1", said, [group]) if notes_of_failed else None
    rows = []
    for one in measured:
        told = np.isfinite(one.log_step_ratio)
        agree = one.log_step_ratio[told] + one.log_ratio[told]
        rows.append(
            [
                one.arm,
                one.part,
                f"{len(one.folders)}",
                f"{len(one.log_ratio)}",
                f"{np.exp(np.median(one.log_ratio)):.2g}",
                f"{np.abs(one.log_gradient_ratio - one.log_ratio).max():.0e}",
                interval_text(over_pairs(list(one.by_seed(one.cosine).values()))),
                interval_text(over_pairs(list(one.by_seed(one.left).values()))),
                _share(list(one.by_seed(one.both_ways).values())),
                f"{np.exp(np.median(agree)):.2f}" if len(agree) else "",
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
        _of_a_step(measured),
        "Remark 1: DPO learns badly from hard pairs because the two gradients counteract each other, which is a large "
        "cosine and little left of them.",
        "Intervals: Student's, of one seed over its pairs, of several over the seeds' means; of the share Wilson's, "
        "wider by what the seeds differ in.",
        *notes_of_failed,
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
    steps = figures.scatter(
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
        y="log of rise of x_w over fall of x_l in a step",
    )
    cosines = figures.dots(
        {
            arm: [
                figures.Point(one.part, figures.exactly(0.0), over_pairs(list(one.by_seed(one.cosine).values())))
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
        "Theorem 1, Corollary 1 and Remark 1",
        _opening(measured),
        [Group(figures=[picture, steps, cosines], table=Table(headings, rows, notes))],
    )


def failed(results: Results) -> list[tuple[str, str]]:
    """What could not be measured, and why."""
    return [
        (f"gradients of {results.named(run, one.arm)} on {one.part} pairs (seed {one.seed})", one.reason)
        for run in results.runs
        for one in run.gradients
        if one.reason
    ]


def measurements(results: Results) -> list[Measured]:
    """Every DPO model on every part of the pairs."""
    folders: dict[tuple[str, str], dict[int, Path]] = {}
    for run in results.runs:
        for one in run.gradients:
            if one.folder:
                folders.setdefault((results.named(run, one.arm), one.part), {})[one.seed] = Path(one.folder)
    return [Measured(arm, part, places) for (arm, part), places in folders.items()]


def over_pairs(by_seed: Sequence[Values]) -> Interval:
    """A mean over seeds of means over pairs, by Student's t: of one seed over its pairs, of several over seeds."""
    if len(by_seed) == 1:
        return crossed_interval(by_seed[0][None])
    return crossed_interval(np.array([[values.mean()] for values in by_seed]))


def _share(by_seed: Sequence[Values]) -> str:
    found = share_interval([float(values.sum()) for values in by_seed], [len(values) for values in by_seed])
    return f"{found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _correlation_of_a_step(measured: list[Measured]) -> tuple[float, int] | None:
    """Of the log of the rise of x_w over the fall of x_l in a step with log(x_l / x_w), and over how many pairs."""
    x, y = (np.concatenate([getattr(one, name) for one in measured]) for name in ("log_ratio", "log_step_ratio"))
    told = np.isfinite(y)
    if told.sum() < 3 or not x[told].std() or not y[told].std():
        return None
    return float(np.corrcoef(x[told], y[told])[0, 1]), int(told.sum())


def _of_a_step(measured: list[Measured]) -> str:
    """How the rise of x_w over the fall of x_l in a step goes with x_l / x_w."""
    found = _correlation_of_a_step(measured)
    if found is None:
        return "Too few pairs have a step that raises chosen and lowers rejected to compare its ratio with x_l / x_w."
    return (
        f"A step in the weights changes x by x times the change of the log-prob: over {found[1]} pairs whose "
        "step raises chosen and lowers rejected, the log of the rise of x_w over the fall of x_l has a correlation of "
        f"{found[0]:.2f} with log(x_l / x_w)."
    )


def _opening(measured: list[Measured]) -> str:
    error = max(float(np.abs(one.log_gradient_ratio - one.log_ratio).max()) for one in measured)
    ratios = np.concatenate([one.log_ratio for one in measured])
    said = (
        f"Corollary 1 holds as the identity that it is: on {len(ratios)} measurements, x_l / x_w from "
        f"{np.exp(ratios.min()):.2g} to {np.exp(ratios.max()):.2g}, the log of the measured gradient ratio differs "
        f"from its log by at most {error:.0e}"
    )
    if (found := _correlation_of_a_step(measured)) is not None:
        said += (
            f"; in a small step of the weights, though, the log of the rise of x_w over the fall of x_l has a "
            f"correlation of {found[0]:.2f} with log(x_l / x_w)"
        )
    easy, hard = cosines(measured)
    if not easy:
        return f"{said}."
    difference, p = apart(hard, easy)
    words = {1: "which has Remark 1's sign", -1: "against Remark 1", 0: "which does not tell them apart"}
    word = "which has no interval" if math.isnan(difference.low) else words[sign(difference, p)]
    one, other = (float(np.mean([values.mean() for values in part])) for part in (easy, hard))
    over = "pairs at one seed" if len(easy) == 1 else f"{len(easy)} seeds"
    return (
        f"{said}; the cosine between the gradients of chosen and rejected is {one:.2f} on easy and {other:.2f} on hard "
        f"pairs, a difference of {interval_text(difference)} (95% interval over {over}), {word}."
    )


def cosines(measured: Sequence[Measured]) -> tuple[list[Values], list[Values]]:
    """Of easy and of hard pairs, seed by seed: every pair's cosine, averaged over the models measured on both parts.

    The models are measured on the same pairs, which therefore count once.
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


def apart(one: Sequence[Values], other: Sequence[Values]) -> tuple[Interval, float]:
    """The difference of two means and the p of none: of one seed over either's pairs, of several over seeds."""
    if len(one) > 1:
        return crossed_estimate(np.array([[a.mean() - b.mean()] for a, b in zip(one, other, strict=True)]))
    parts = [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in (one[0], other[0]) if len(part) > 1]
    if len(parts) < 2:
        parts = [(0.0, 1)]
    return student_estimate(float(one[0].mean() - other[0].mean()), parts)
