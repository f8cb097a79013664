"""Confidence intervals of means over seeds and prompts, and of proportions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from scipy.optimize import bisect
from scipy.special import stdtr, stdtrit

RELATIVE_TOLERANCE = 1e-9
"""Values whose range, relative to the largest, is at most this count as equal (rounding errors)."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def estimate_from_variance_components(
    mean: float, components: Sequence[tuple[float, int]], *, level: float = 0.95
) -> tuple[Interval, float]:
    """(interval, p-value of mean 0) of a mean whose variance is a sum of components (Banerjee 1960).

    `components` are the estimated variance components v_i with their degrees of freedom d_i. The interval is
    mean -+ sqrt(sum t_i^2 v_i), t_i Student's quantile at d_i; for normal components it covers at least `level` at any
    degrees of freedom. With one component it is Student's interval. p < 0.05 if and only if the 95% interval excludes
    0. Without variance the bounds are nan and p is 1.
    """
    variances, degrees = (np.array(column, dtype=np.float64) for column in zip(*components, strict=True))
    total = float(variances.sum())
    if total == 0.0:
        return Interval(mean, math.nan, math.nan), 1.0

    def half_width(tail: float) -> float:
        """Half the width of the interval with this probability in each tail."""
        return math.sqrt(float((stdtrit(degrees, tail) ** 2) @ variances))

    width = half_width((1.0 - level) / 2.0)
    # The tail lies between those of Student's t with the most and with the fewest degrees of any part.
    t = -abs(mean) / math.sqrt(total)
    least = max(0.999 * float(stdtr(degrees.max(), t)), 1e-300)
    most = min(1.001 * float(stdtr(degrees.min(), t)), 0.5)
    if half_width(least) > abs(mean) >= half_width(most):
        least = math.exp(bisect(lambda log: half_width(math.exp(log)) - abs(mean), math.log(least), math.log(most)))
    return Interval(mean, mean - width, mean + width), min(1.0, 2.0 * least)


def estimate_crossed_mean(
    values: Float64[np.ndarray, "seeds prompts"], *, level: float = 0.95
) -> tuple[Interval, float]:
    """(mean with its confidence interval, p-value of mean 0) over crossed seeds and prompts.

    Both seeds and prompts are random effects: the components of the variance (see `estimate_from_variance_components`)
    are that of the seeds' means over S and that of the prompts' means over P, with S - 1 and P - 1 degrees of freedom.
    Both include the residual noise, so the interval is conservative. With one seed only prompts vary, and the interval
    does not cover other seeds; with one prompt only seeds vary. If all values are equal, bounds are nan and p is 1.
    Raises ValueError without values and on a nan.
    """
    if values.size == 0 or np.isnan(values).any():
        raise ValueError(f"expected numbers, found {int(np.isnan(values).sum())} nan among {values.size} values")
    mean, parts = float(values.mean()), []
    if np.ptp(values) > RELATIVE_TOLERANCE * np.abs(values).max():
        for means in (values.mean(axis=1), values.mean(axis=0)):
            if len(means) > 1:
                parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    return estimate_from_variance_components(mean, parts or [(0.0, 1)], level=level)


def compute_crossed_mean_interval(values: Float64[np.ndarray, "seeds prompts"], *, level: float = 0.95) -> Interval:
    """Mean over crossed seeds and prompts, both random effects, with its confidence interval."""
    return estimate_crossed_mean(values, level=level)[0]


def wilson_interval(successes: int | float, trials: int | float, *, level: float = 0.95) -> Interval:
    """Share of successes, ties as halves, with its score interval (Wilson 1927). Raises ValueError without trials."""
    return wilson_interval_over_seeds([successes], [trials], level=level)


def wilson_interval_over_seeds(
    successes: Sequence[int | float], trials: Sequence[int | float], *, level: float = 0.95
) -> Interval:
    """Proportion of successes over seeds, with a Wilson interval at an effective sample size (Korn and Graubard 1998).

    `successes` and `trials` have one entry per seed. The effective sample size is n / (1 + t^2 v / (z^2
    p (1 - p) / n)) with n the mean number of trials per seed (seeds may share items), v the variance of the ratio over
    seeds and t Student's quantile at S - 1 degrees of freedom. With one seed it is Wilson's interval. Raises ValueError
    without trials.
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
    half_width = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(share, max(0.0, centre - half_width), min(1.0, centre + half_width))
