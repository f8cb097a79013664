"""Confidence intervals of means over seeds and prompts, and of shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from scipy.optimize import bisect
from scipy.special import stdtr, stdtrit

ALIKE = 1e-9
"""Values whose range is within this part of the largest one differ by rounding alone."""


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
