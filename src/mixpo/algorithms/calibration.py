"""Accuracy and calibration of a reward model's margins, in bins."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, wilson_interval


@dataclass(frozen=True)
class AccuracyBin:
    """Reward-model accuracy on the pairs with |score gap| in [low, high): share ranked as labelled."""

    low: float
    high: float
    """Upper bound of the gap; infinite for the last bin."""
    count: int
    accuracy: float | None
    """Share of correctly ranked pairs; None in an empty bin."""
    interval: Interval | None


def bin_accuracy_by_gap(margins: Float64[np.ndarray, " n"], bin_edges: Sequence[float]) -> list[AccuracyBin]:
    """Accuracy per bin of |margin|, margin = score of chosen - score of rejected (figure 2 of the paper).

    `bin_edges` are the bins' lower bounds, from 0 up; the last bin has no upper bound, so every pair is in exactly one.
    A margin of 0 counts as wrong. Raises ValueError on edges that do not increase from 0.
    """
    bounds = [*bin_edges, float("inf")]
    if bounds[0] != 0.0 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that increase from 0, found {list(bin_edges)}")
    bins = []
    for low, high in pairwise(bounds):
        inside = margins[(np.abs(margins) >= low) & (np.abs(margins) < high)]
        correct = int((inside > 0).sum())
        interval = wilson_interval(correct, len(inside)) if len(inside) else None
        bins.append(AccuracyBin(low, high, len(inside), interval.mean if interval else None, interval))
    return bins


@dataclass(frozen=True)
class CalibrationBin:
    """Predicted and observed accuracy of the pairs with confidence in [low, high), in [low, 1] for the last bin."""

    low: float
    high: float
    count: int
    predicted: float | None
    """Mean confidence; None in an empty bin."""
    observed: float | None
    """Share of pairs that the reward model ranks as labelled, a margin of 0 counting half; None in an empty bin."""
    interval: Interval | None
    """Wilson interval of the observed share."""


def bin_calibration(margins: Float64[np.ndarray, " n"], bin_edges: Sequence[float]) -> list[CalibrationBin]:
    """Predicted and observed accuracy per bin of confidence, sigma(|margin|) of the Bradley-Terry model.

    margin = score of chosen - score of rejected. `bin_edges` are the bins' lower bounds, from 0.5 up; the last bin
    includes 1, so every pair is in exactly one. Raises ValueError on edges that do not increase from 0.5 to below 1 and
    on a margin of nan.
    """
    bounds = [*bin_edges, 1.0]
    if bounds[0] != 0.5 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that increase from 0.5 to below 1, found {list(bin_edges)}")
    if missing := int(np.isnan(margins).sum()):
        raise ValueError(f"{missing} of {margins.size} margins are nan; drop them or fix the scores they come from")
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    index = np.searchsorted(bin_edges, confidence, side="right") - 1
    bins = []
    for number, (low, high) in enumerate(pairwise(bounds)):
        inside = index == number
        count = int(inside.sum())
        ordered = float((np.sign(margins[inside]) + 1.0).sum() / 2.0)
        predicted = float(confidence[inside].mean()) if count else None
        interval = wilson_interval(ordered, count) if count else None
        bins.append(CalibrationBin(low, high, count, predicted, interval.mean if interval else None, interval))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error (Naeini et al. 2015): mean |predicted - observed|, weighted by the bins' counts."""
    total = sum(b.count for b in bins)
    if total == 0:
        raise ValueError("a calibration error needs at least one pair")
    gaps = (b.count * abs(b.predicted - b.observed) for b in bins if b.predicted is not None and b.observed is not None)
    return sum(gaps) / total
