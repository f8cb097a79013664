"""Accuracy and calibration of a reward model's margins, in bins."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, wilson_interval


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


def bin_accuracy_by_gap(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[AccuracyBin]:
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


def bin_calibration(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[CalibrationBin]:
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
