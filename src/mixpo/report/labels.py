"""Where the names of points in a plane stand, so that none covers another: geometry alone, in any one unit."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

DISTANCES = (5, 8, 12, 17, 23, 30, 38, 47, 57)
"""Tried from a point to its name, the nearest first."""
DIRECTIONS = 24
LEADER = 9
"""From this distance on a line leads from the point to its name."""
HALF_MARK = 3.5
CROSSED, BLOCKED = 4.0, 25.0
"""What it costs, as distance does, that a name covers a line, and that its own line runs over a point or a name."""


class Box(NamedTuple):
    """A rectangle along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds(self, other: "Box") -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )


class Label(NamedTuple):
    """Where a name stands."""

    box: Box
    side: int
    """Of its point: -1 to the left, 1 to the right, 0 above or below."""
    leader: tuple[tuple[float, float], tuple[float, float]] | None
    """The ends of the line that leads to it; None where it stands close by."""


def placed(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    frame: Box,
    lines: Sequence[Box] = (),
) -> list[Label | None]:
    """A place for a name of every size beside its point, within the frame and on no point or other name.

    The most crowded point chooses first, each the cheapest place: near, with few of `lines` below it. None where there
    is no room.
    """
    marks = [Box(x - HALF_MARK, y - HALF_MARK, x + HALF_MARK, y + HALF_MARK) for x, y in points]
    crossed = list(lines)
    found: list[Label | None] = [None] * len(points)
    for number in sorted(range(len(points)), key=lambda one: _room(points, one)):
        taken = [*marks, *(label.box for label in found if label is not None)]
        others = [box for box in taken if box is not marks[number]]
        best = math.inf
        for distance, label in _places(points[number], sizes[number]):
            if not frame.holds(label.box) or any(label.box.overlaps(box) for box in taken):
                continue
            cost = distance + CROSSED * sum(label.box.overlaps(line) for line in crossed)
            cost += BLOCKED * sum(step.overlaps(box) for step in _steps(label) for box in others)
            if cost < best:
                best, found[number] = cost, label
        if (chosen := found[number]) is not None:
            crossed += _steps(chosen)
    return found


def _room(points: Sequence[tuple[float, float]], number: int) -> float:
    return -sum(math.exp(-math.dist(points[number], other) / 20) for other in points)


def _places(point: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Label]]:
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


def _steps(label: Label) -> list[Box]:
    """The line to a name as a row of small boxes."""
    if label.leader is None:
        return []
    (x, y), (to_x, to_y) = label.leader
    count = math.ceil(math.dist(*label.leader) / 2)
    shares = [(step + 1) / (count + 1) for step in range(count)]
    middles = [(x + share * (to_x - x), y + share * (to_y - y)) for share in shares]
    return [Box(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in middles]
