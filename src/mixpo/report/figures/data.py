"""The numbers that figures draw, and the table of numbers that stands behind each figure."""

import math
from dataclasses import dataclass

from mixpo.algorithms.intervals import Interval


@dataclass(frozen=True)
class Point:
    """A named point of a figure: x and y as means with bounds; bounds that are nan draw no error bar."""

    name: str
    x: Interval
    y: Interval


@dataclass(frozen=True)
class BinShare:
    """A bin of pairs: its label, its count, and the share ordered as labelled (None if the bin is empty)."""

    label: str
    count: int
    share: Interval | None


Bin = tuple[float, Interval, int]
"""A bin of a calibration: predicted confidence, observed share, number of pairs."""


def exact_interval(value: float) -> Interval:
    """An interval whose mean and bounds all are the value, for what has no uncertainty."""
    return Interval(float(value), float(value), float(value))


def make_y_point(x: float, y_interval: Interval) -> Point:
    """An unnamed point with error bars in y only."""
    return Point("", Interval(float(x), math.nan, math.nan), y_interval)


def keep_finite(value: float) -> float | None:
    """The number, or None if it is nan or infinite."""
    return float(value) if math.isfinite(value) else None


def split_interval(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) as table cells, None for what is nan or infinite; three None for no interval."""
    if interval is None:
        return None, None, None
    return keep_finite(interval.mean), keep_finite(interval.low), keep_finite(interval.high)


def split_heading(label: str) -> tuple[str, str, str]:
    """Three column headings for an interval: `label`, `label, low`, `label, high`."""
    return label, f"{label}, low", f"{label}, high"


def flatten_point(point: Point) -> tuple[str | float | None, ...]:
    """A table row: the point's name, then mean, low and high of x and of y, None for nan."""
    return point.name, *split_interval(point.x), *split_interval(point.y)
