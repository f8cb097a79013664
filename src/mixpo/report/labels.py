"""Placement of labels beside points without overlaps, as geometry in one unit."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

DISTANCES = (5, 8, 12, 17, 23, 30, 38, 47, 57)
"""Candidate distances from a point to its label, the nearest first."""
DIRECTIONS = 24
LEADER = 9
"""Distance from which a line leads from the point to its label."""
HALF_MARK = 3.5
CROSSED, BLOCKED = 4.0, 25.0
"""Costs, in units of distance, of a label on a line, and of a leader over a point or another label."""


class Box(NamedTuple):
    """A rectangle parallel to the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps_box(self, other: "Box") -> bool:
        """True if the two rectangles share more than an edge."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def contains_box(self, other: "Box") -> bool:
        """True if the other rectangle lies inside this one."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.bottom <= other.bottom and other.top <= self.top


class PlacedLabel(NamedTuple):
    """The position of a label: its box, its side of the point, and the ends of a line from the point if it is far."""

    box: Box
    side: int
    """-1 to the left of its point, 1 to the right, 0 above or below."""
    leader: tuple[tuple[float, float], tuple[float, float]] | None
    """The ends of the line from the point to the label; None where the label is close."""


def place_labels(
    points: Sequence[tuple[float, float]],
    label_sizes: Sequence[tuple[float, float]],
    *,
    frame: Box,
    error_bars: Sequence[Box] = (),
) -> list[PlacedLabel | None]:
    """A position for every label: near its point, in the frame, on no point or other label; None where none is free.

    The most crowded point chooses first, and each takes the cheapest position: near, and on few of `error_bars`.
    """
    marks = [Box(x - HALF_MARK, y - HALF_MARK, x + HALF_MARK, y + HALF_MARK) for x, y in points]
    crossed = list(error_bars)
    labels: list[PlacedLabel | None] = [None] * len(points)
    crowding = [sum(math.exp(-math.dist(point, other) / 20) for other in points) for point in points]
    for i in sorted(range(len(points)), key=crowding.__getitem__, reverse=True):
        taken = [*marks, *(label.box for label in labels if label is not None)]
        others = [box for box in taken if box is not marks[i]]
        best = math.inf
        for distance, label in _list_positions(points[i], label_sizes[i]):
            if not frame.contains_box(label.box) or any(label.box.overlaps_box(box) for box in taken):
                continue
            cost = distance + CROSSED * sum(label.box.overlaps_box(line) for line in crossed)
            cost += BLOCKED * sum(part.overlaps_box(box) for part in _split_leader_into_boxes(label) for box in others)
            if cost < best:
                best, labels[i] = cost, label
        if (chosen := labels[i]) is not None:
            crossed += _split_leader_into_boxes(chosen)
    return labels


def _list_positions(point: tuple[float, float], label_size: tuple[float, float]) -> Iterator[tuple[float, PlacedLabel]]:
    """Yield the distance and position of every candidate around the point, the nearest first."""
    (x, y), (width, height) = point, label_size
    for distance in DISTANCES:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            left = x + math.cos(angle) * (distance + width / 2) - width / 2
            bottom = y + math.sin(angle) * (distance + height / 2) - height / 2
            box = Box(left, bottom, left + width, bottom + height)
            end = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
            side = round(math.cos(angle) * 1.2)
            yield distance, PlacedLabel(box, side, (point, end) if distance >= LEADER else None)


def _split_leader_into_boxes(label: PlacedLabel) -> list[Box]:
    """Small boxes along the line from the point to its label; empty without a line."""
    if label.leader is None:
        return []
    middles = np.linspace(*label.leader, math.ceil(math.dist(*label.leader) / 2) + 2)[1:-1].tolist()
    return [Box(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in middles]
