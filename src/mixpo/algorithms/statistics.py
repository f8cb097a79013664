"""Figures with their uncertainty: intervals, p-values, win/tie/lose, accuracy by gap, calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from scipy.optimize import bisect
from scipy.special import bdtr, expit, stdtr, stdtrit

ALIKE = 1e-9
"""Values whose range is within this part of the largest one differ by rounding alone."""
FEWEST_DECIDED = 10
"""Wins and defeats from which a win rate at equal length is told: its errors are those of many."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def student_estimate(mean: float, parts: Sequence[tuple[float, int]], *, level: float = 0.95) -> tuple[Interval, float]:
    """A mean's interval and the p of "it is 0", where its variance is a sum of parts estimated apart.

    `parts` are the estimated variances v_i with their degrees of freedom d_i. The interval is mean -+ sqrt(sum t_i^2
    v_i), t_i Student's quantile at d_i (Banerjee 1960): of normal parts it covers at least `level`, however few degrees
    a part has. Of one part it is Student's. p is the level's complement at which the interval's bound is 0, so p < 0.05
    is the same as a 95% interval without 0. Without any variance nothing is told: bounds of nan, p 1.
    """
    variances, degrees = (np.array(column, dtype=np.float64) for column in zip(*parts, strict=True))
    total = float(variances.sum())
    if total == 0.0:
        return Interval(mean, math.nan, math.nan), 1.0

    def half(tail: float) -> float:
        return math.sqrt(float((stdtrit(degrees, tail) ** 2) @ variances))

    width = half((1.0 - level) / 2.0)
    # The tail lies between those of Student's t with the most and with the fewest degrees of any part.
    t = -abs(mean) / math.sqrt(total)
    least = max(0.999 * float(stdtr(degrees.max(), t)), 1e-300)
    most = min(1.001 * float(stdtr(degrees.min(), t)), 0.5)
    if half(least) > abs(mean) >= half(most):
        least = math.exp(bisect(lambda log: half(math.exp(log)) - abs(mean), math.log(least), math.log(most)))
    return Interval(mean, mean - width, mean + width), min(1.0, 2.0 * least)


def crossed_estimate(values: Float64[np.ndarray, "seeds prompts"], *, level: float = 0.95) -> tuple[Interval, float]:
    """The mean over seeds and prompts with its interval and the p of "it is 0", which speak of others of both alike.

    The variance of the seeds' means over S and that of the prompts' means over P are its parts, with S - 1 and P - 1
    degrees of freedom (`student_estimate`). Both hold the noise of a seed's prompt, so the interval is rather too wide.
    Of a single seed only prompts vary, and it says nothing of other seeds; of a single prompt only seeds do. Values
    that are all alike, and a single one, have no spread: bounds of nan, p 1. Raises ValueError without values and on a
    nan.
    """
    if values.size == 0 or np.isnan(values).any():
        raise ValueError(f"expected numbers, found {int(np.isnan(values).sum())} nan among {values.size} values")
    mean, parts = float(values.mean()), []
    if np.ptp(values) > ALIKE * np.abs(values).max():
        for means in (values.mean(axis=1), values.mean(axis=0)):
            if len(means) > 1:
                parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    return student_estimate(mean, parts or [(0.0, 1)], level=level)


def crossed_interval(values: Float64[np.ndarray, "seeds prompts"], *, level: float = 0.95) -> Interval:
    """The mean over seeds and prompts with the interval of `crossed_estimate`."""
    return crossed_estimate(values, level=level)[0]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the order given. Raises ValueError on one outside [0, 1]."""
    if wrong := [p for p in p_values if not 0.0 <= p <= 1.0]:
        raise ValueError(f"expected p-values from 0 to 1, found {wrong}")
    order = np.argsort(p_values, kind="stable")
    left = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * left), 1.0)
    return corrected.tolist()


def wilson_interval(successes: int | float, trials: int | float, *, level: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927); a tie may count half. Raises ValueError without trials."""
    return share_interval([successes], [trials], level=level)


def share_interval(successes: Sequence[int | float], trials: Sequence[int | float], *, level: float = 0.95) -> Interval:
    """A share of all trials, given seed by seed, with an interval that never shrinks to nothing.

    Wilson's of the trials of one seed (their mean), since the seeds may judge the same items, over the growth of the
    variance by what the seeds differ in (an effective number, as in Korn and Graubard 1998): 1 + t^2 v / (z^2 p (1 - p)
    / n), v the variance of the ratio over seeds, t Student's quantile at S - 1 degrees of freedom. Of one seed it is
    Wilson's. Raises ValueError without trials.
    """
    wins, counts = np.array(successes, dtype=np.float64), np.array(trials, dtype=np.float64)
    if counts.sum() <= 0:
        raise ValueError("a share needs at least one trial")
    seeds, share, n = len(counts), float(wins.sum() / counts.sum()), float(counts.mean())
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    if seeds > 1 and 0.0 < share < 1.0:
        variance = float((((wins - share * counts) / n) ** 2).sum()) / (seeds - 1) / seeds
        t = float(stdtrit(seeds - 1, 0.5 + level / 2.0))
        n /= 1.0 + t * t * variance / (z * z * share * (1.0 - share) / n)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def sign_test(wins: int, defeats: int) -> float:
    """The exact two-sided p of "a win is as likely as a defeat"; ties tell nothing, and without either it is 1."""
    return min(1.0, 2.0 * float(bdtr(min(wins, defeats), wins + defeats, 0.5))) if wins + defeats else 1.0


def win_minus_lose(wins: int | float, ties: int | float, defeats: int | float, *, level: float = 0.95) -> Interval:
    """The share of wins minus that of defeats, with an interval that is honest for few prompts too.

    Agresti and Min 2005: 1/2 is added to each cell of the table of matched pairs, so 1/2 to wins and to defeats and 1
    to ties, which are two of its cells; then it is Wald's, (w - d) / n -+ z sqrt(w + d - (w - d)^2 / n) / n, within
    [-1, 1]. A prompt may count in parts, as where its judges differ: then it is rather too wide. Raises ValueError
    without prompts.
    """
    if wins + ties + defeats <= 0:
        raise ValueError("a difference of shares needs at least one prompt")
    n, decided, lead = wins + ties + defeats + 2.0, wins + defeats + 1.0, wins - defeats
    half = NormalDist().inv_cdf(0.5 + level / 2.0) * (decided - lead * lead / n) ** 0.5 / n
    return Interval(lead / (n - 2.0), max(-1.0, lead / n - half), min(1.0, lead / n + half))


def win_tie_lose(one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Shares of places at which `one` is greater than, equal to, and less than `other`. They sum to 1."""
    return float((one > other).mean()), float((one == other).mean()), float((one < other).mean())


def length_controlled(wins: Float64[np.ndarray, " n"], longer: Float64[np.ndarray, " n"]) -> Interval | None:
    """The win rate at equal length with its 95% interval (Dubois et al. 2024, without their difficulty of prompts).

    sigma(theta) of the logistic regression sigma(theta + phi tanh(d / sd(d))) of wins (1, a tie 0.5, a defeat 0) on how
    much longer, d, the first completion is; the errors are robust, since a tie is no draw of 0 or 1, times the root of
    n / (n - 2) for the two that are fitted. None where it cannot be told: of fewer than `FEWEST_DECIDED` wins and
    defeats, where d does not vary, and where a length parts wins from defeats, so that no theta is best (Albert and
    Anderson 1984).
    """
    won, lost = longer[wins > 0.0], longer[wins < 1.0]
    parted = won.size == 0 or lost.size == 0 or won.min() >= lost.max() or won.max() <= lost.min()
    if parted or (wins != 0.5).sum() < FEWEST_DECIDED or longer.min() == longer.max():
        return None
    from statsmodels.genmod.families import Binomial  # slow to import
    from statsmodels.genmod.generalized_linear_model import GLM

    lengths = np.tanh(longer / longer.std())
    fit = GLM(wins, np.column_stack([np.ones_like(lengths), lengths]), family=Binomial()).fit(cov_type="HC0")
    if not fit.converged:
        return None
    half = NormalDist().inv_cdf(0.975) * fit.bse[0] * (len(wins) / (len(wins) - 2)) ** 0.5
    return Interval(*(float(expit(fit.params[0] + shift)) for shift in (0.0, -half, half)))


@dataclass(frozen=True)
class AccuracyBin:
    """Pairs whose gap lies in [low, high), and the share of them that the reward model orders as people did."""

    low: float
    high: float
    """Infinite for the last bin."""
    count: int
    accuracy: float | None
    """None in an empty bin."""
    interval: Interval | None


def accuracy_by_gap(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[AccuracyBin]:
    """Accuracy and count per bin of |margin|, margin = score of chosen - score of rejected. Figure 2 of the paper.

    `edges` are the bins' lower bounds, from 0 up; the last bin is open, so every pair is in exactly one. A margin of
    exactly 0 decides nothing and counts as wrong. Raises ValueError on edges that do not rise from 0.
    """
    bounds = [*edges, float("inf")]
    if bounds[0] != 0.0 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that rise from 0, found {list(edges)}")
    bins = []
    for low, high in pairwise(bounds):
        inside = margins[(np.abs(margins) >= low) & (np.abs(margins) < high)]
        correct = int((inside > 0).sum())
        accuracy = correct / len(inside) if len(inside) else None
        interval = wilson_interval(correct, len(inside)) if len(inside) else None
        bins.append(AccuracyBin(low, high, len(inside), accuracy, interval))
    return bins


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose confidence lies in [low, high), the last bin's in [low, 1]: what was predicted and what was seen."""

    low: float
    high: float
    count: int
    predicted: float | None
    """The mean confidence. None in an empty bin."""
    observed: float | None
    """The share of pairs that the reward model orders as people did, a margin of 0 counting half."""
    interval: Interval | None
    """Of the observed share (Wilson)."""


def calibration(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[CalibrationBin]:
    """Predicted and observed accuracy per bin of sigma(|margin|), the Bradley-Terry probability of the order given.

    margin = score of chosen - score of rejected. `edges` are the bins' lower bounds, from 0.5 up; the last bin is
    closed at 1, so every pair is in exactly one. Raises ValueError on edges that do not rise from 0.5 to below 1 and
    on a margin of nan.
    """
    bounds = [*edges, 1.0]
    if bounds[0] != 0.5 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that rise from 0.5 to below 1, found {list(edges)}")
    if missing := int(np.isnan(margins).sum()):
        raise ValueError(f"{missing} of {margins.size} margins are nan; drop them or fix the scores they come from")
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    index = np.searchsorted(edges, confidence, side="right") - 1
    bins = []
    for number, (low, high) in enumerate(pairwise(bounds)):
        inside = index == number
        count = int(inside.sum())
        if count == 0:
            bins.append(CalibrationBin(low, high, 0, None, None, None))
            continue
        ordered = float((np.sign(margins[inside]) + 1.0).sum() / 2.0)
        interval = wilson_interval(ordered, count)
        bins.append(CalibrationBin(low, high, count, float(confidence[inside].mean()), interval.mean, interval))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: the mean |predicted - observed|, weighted by count (Naeini et al. 2015).

    Raises ValueError where every bin is empty.
    """
    total = sum(b.count for b in bins)
    if total == 0:
        raise ValueError("a calibration error needs at least one pair")
    gaps = (b.count * abs(b.predicted - b.observed) for b in bins if b.predicted is not None and b.observed is not None)
    return sum(gaps) / total
