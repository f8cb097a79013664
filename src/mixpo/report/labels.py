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

    def overlaps(self, other: "Box") -> bool:
        """True if the two share more than an edge."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def contains(self, other: "Box") -> bool:
        """True if the other lies inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.bottom <= other.bottom and other.top <= self.top


class Label(NamedTuple):
    """The position of a label."""

    box: Box
    side: int
    """-1 to the left of its point, 1 to the right, 0 above or below."""
    leader: tuple[tuple[float, float], tuple[float, float]] | None
    """The ends of the line from the point to the label; None where the label is close."""


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    frame: Box,
    lines: Sequence[Box] = (),
) -> list[Label | None]:
    """Choose a position for every label: near its point, inside the frame, on no point and on no other label.

    The most crowded point chooses first, and each takes the cheapest position: near, and on few of `lines`. None where
    no position is free.
    """
    marks = [Box(x - HALF_MARK, y - HALF_MARK, x + HALF_MARK, y + HALF_MARK) for x, y in points]
    crossed = list(lines)
    labels: list[Label | None] = [None] * len(points)
    crowding = [sum(math.exp(-math.dist(point, other) / 20) for other in points) for point in points]
    for i in sorted(range(len(points)), key=crowding.__getitem__, reverse=True):
        taken = [*marks, *(label.box for label in labels if label is not None)]
        others = [box for box in taken if box is not marks[i]]
        best = math.inf
        for distance, label in _list_candidates(points[i], sizes[i]):
            if not frame.contains(label.box) or any(label.box.overlaps(box) for box in taken):
                continue
            cost = distance + CROSSED * sum(label.box.overlaps(line) for line in crossed)
            cost += BLOCKED * sum(part.overlaps(box) for part in _cover_leader(label) for box in others)
            if cost < best:
                best, labels[i] = cost, label
        if (chosen := labels[i]) is not None:
            crossed += _cover_leader(chosen)
    return labels


def _list_candidates(point: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Label]]:
    """All positions of a label around its point, with their distances."""
    (x, y), (width, height) = point, size
    for distance in DISTANCES:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            left = x + math.cos(angle) * (distance + width / 2) - width / 2
            bottom = y + math.sin(angle) * (distance + height / 2) - height / 2
            box = Box(left, bottom, left + width, bottom + height)
            end = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
            side = round(math.cos(angle) * 1.2)
            yield distance, Label(box, side, (point, end) if distance >= LEADER else None)


def _cover_leader(label: Label) -> list[Box]:
    """The line to a label as a row of small boxes."""
    if label.leader is None:
        return []
    middles = np.linspace(*label.leader, math.ceil(math.dist(*label.leader) / 2) + 2)[1:-1].tolist()
    return [Box(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in middles]
