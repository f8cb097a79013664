"""Figures with their uncertainty: bootstrap and Wilson intervals, win/tie/lose, accuracy by gap."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

CHUNK = 1 << 22
"""Resampled values held at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float] | Float64[np.ndarray, " n"], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979): values drawn with replacement, `resamples` times.

    Raises ValueError without values. One value has no spread to resample: its bounds are nan.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("a mean needs at least one value")
    if array.size == 1:
        return Interval(float(array[0]), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // array.size)
    means = np.concatenate(
        [
            array[generator.integers(array.size, size=(min(rows, resamples - start), array.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927). Raises ValueError without trials."""
    if trials < 1:
        raise ValueError("a share needs at least one trial")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def win_tie_lose(
    one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"], *, tie: float = 0.0
) -> tuple[float, float, float]:
    """Shares of places at which `one` is greater than, within `tie` of, and less than `other`. They sum to 1."""
    difference = one - other
    wins, losses = float((difference > tie).mean()), float((difference < -tie).mean())
    return wins, float((np.abs(difference) <= tie).mean()), losses


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
