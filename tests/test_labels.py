"""Names beside points: on nothing else, within the frame, near their points, none where there is no room."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.report.labels import HALF_MARK, LEADER, Box, place_labels

FRAME = Box(0.0, 0.0, 300.0, 200.0)
POINTS = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(POINTS, st.floats(5, 60))
def test_names_cover_no_point_and_no_other_name(points: list[tuple[float, float]], width: float) -> None:
    found = [label for label in place_labels(points, [(width, 9.0)] * len(points), frame=FRAME) if label is not None]
    marks = [Box(x - HALF_MARK, y - HALF_MARK, x + HALF_MARK, y + HALF_MARK) for x, y in points]
    assert not [1 for one, other in itertools.combinations(found, 2) if one.box.overlaps_box(other.box)]
    assert not [1 for label, mark in itertools.product(found, marks) if label.box.overlaps_box(mark)]
    assert all(FRAME.contains_box(label.box) for label in found)
    assert all((label.leader is None) or label.leader[0] in points for label in found)


def test_a_name_stands_on_the_free_side() -> None:
    (left,) = place_labels([(299.0, 100.0)], [(40.0, 9.0)], frame=FRAME)
    assert left.side == -1
    assert left.box.right < 299.0
    assert left.leader is None
    line = Box(105.0, 99.5, 300.0, 100.5)
    (free,) = place_labels([(100.0, 100.0)], [(40.0, 9.0)], frame=FRAME, error_bars=[line])
    assert not free.box.overlaps_box(line)


def test_a_line_leads_to_a_name_that_stands_away() -> None:
    crowd = [(100.0 + 8 * column, 100.0 + 8 * row) for column in range(3) for row in range(3)]
    found = place_labels(crowd, [(30.0, 9.0)] * 9, frame=FRAME)
    leaders = [label.leader for label in found if label is not None and label.leader is not None]
    assert len(leaders) >= 1
    assert all((x - to_x) ** 2 + (y - to_y) ** 2 >= (LEADER / 2) ** 2 for (x, y), (to_x, to_y) in leaders)


def test_no_room_is_told() -> None:
    assert place_labels([(150.0, 100.0)], [(301.0, 9.0)], frame=FRAME) == [None]
