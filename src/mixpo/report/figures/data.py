"""The numbers that figures draw, and the table of numbers that stands behind each figure."""

import math
from dataclasses import dataclass

from mixpo.algorithms.intervals import Interval


@dataclass(frozen=True)
class Point:
    """A named point in a plane; bounds that are nan draw no error bar."""

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
    """An interval of width 0 around a value without uncertainty."""
    return Interval(float(value), float(value), float(value))


def point_without_x_bounds(x: float, y: Interval) -> Point:
    """A point with error bars in y only."""
    return Point("", Interval(float(x), math.nan, math.nan), y)


def finite_or_none(value: float) -> float | None:
    """The value, or None where it is nan or infinite."""
    return float(value) if math.isfinite(value) else None


def interval_cells(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high of an interval as table cells."""
    if interval is None:
        return None, None, None
    return finite_or_none(interval.mean), finite_or_none(interval.low), finite_or_none(interval.high)


def interval_columns(label: str) -> tuple[str, str, str]:
    """Column names of mean, low and high."""
    return label, f"{label}, low", f"{label}, high"


def point_cells(point: Point) -> tuple[str | float | None, ...]:
    """A point's name and its intervals in x and y as table cells."""
    return point.name, *interval_cells(point.x), *interval_cells(point.y)
