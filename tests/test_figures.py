"""Figures: their numbers are those given, their pictures are well-formed, hostile names are text."""

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from mixpo.algorithms.intervals import Interval
from mixpo.report import figures
from mixpo.report.document import Figure
from mixpo.report.figures import BinShare, Point, exact_interval, plane
from mixpo.report.figures.style import COLOURS, get_colour, get_marker

HOSTILE = "</svg><script>alert(1)</script>--> ]]> \"'&\n$x_1$ 漢 #010203"
NAN = math.nan
POINT = Point(HOSTILE, Interval(1.0, 0.5, 1.5), Interval(2.0, 1.75, 2.25))
BARE = Point("_bare", Interval(0.0, NAN, NAN), Interval(1.0, NAN, NAN))
SHARE = Interval(0.75, 0.5, 0.9)
NAMES = {"name": "a", "xlabel": "x", "ylabel": "y"}


def every() -> dict[str, Callable[[], Figure]]:
    return {
        "plane": lambda: figures.plot_points([POINT, BARE], name="a", xlabel=HOSTILE, ylabel="y"),
        "paths": lambda: figures.plot_paths(
            {f"ppo, {HOSTILE}": [BARE, POINT], "ppo, r*": [POINT], "none": []}, dashed={"ppo, r*"}, **NAMES
        ),
        "dots": lambda: figures.plot_grouped_intervals({HOSTILE: [POINT, BARE], "PPO": [BARE]}, name="a", ylabel="y"),
        "forest": lambda: figures.plot_forest(
            {HOSTILE: {HOSTILE: SHARE, "b": BARE.y}, "r*": {"c": SHARE}}, name="a", reference="b"
        ),
        "shares": lambda: figures.plot_shares_by_bin(
            [BinShare(HOSTILE, 3, SHARE), BinShare("2", 0, None)],
            {HOSTILE: [BinShare("1", 2, SHARE), BinShare("2", 0, None)]},
            title=HOSTILE,
            **NAMES,
        ),
        "calibration": lambda: figures.plot_calibration(
            [(0.6, SHARE, 9), (0.9, BARE.y, 0)], {HOSTILE: [(0.6, SHARE, 9)]}, name="a", title=HOSTILE
        ),
        "histogram": lambda: figures.plot_histogram(
            {HOSTILE: [0.0, 1.0], "r": [2.0, 2.0]}, thresholds=[1.0, 1.5], name="a", xlabel=HOSTILE
        ),
        "lines": lambda: figures.plot_curves(
            {HOSTILE: [(0, 1.0), (1, 2.0)], "_b": [(0, 1.0)]}, name="a", title=HOSTILE, key_names=["_b", HOSTILE]
        ),
    }


@pytest.mark.parametrize("kind", every())
def test_a_figure_is_well_formed_and_the_same_twice(kind: str) -> None:
    figure = every()[kind]()
    tree = ElementTree.fromstring(figure.svg)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert tree.get("role") == "img"
    assert "alert(1)" in tree.get("aria-label", "")
    assert not tree.findall(".//{*}script")
    assert not tree.findall(".//{*}image")
    addresses = [value for one in tree.iter() for key, value in one.items() if key.endswith("href")]
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\((?!#)", figure.svg)
    assert "currentColor" in figure.svg
    assert all(len(row) == len(figure.columns) for row in figure.rows)
    assert figure.rows
    assert all(cell is None or isinstance(cell, str) or math.isfinite(cell) for row in figure.rows for cell in row)
    assert every()[kind]() == figure


def test_ids_of_two_figures_do_not_clash() -> None:
    def ids(name: str) -> set[str]:
        svg = figures.plot_points([POINT, BARE], name=name, xlabel="x", ylabel="y").svg
        return {one.get("id", "") for one in ElementTree.fromstring(svg).iter() if one.get("id")}

    assert ids("a")
    assert not ids("a") & ids("b")


def test_rows_are_the_numbers_given() -> None:
    plane = figures.plot_points([POINT, BARE], name="a", xlabel="KL", ylabel="score")
    assert plane.columns == ("name", "KL", "KL, low", "KL, high", "score", "score, low", "score, high")
    assert plane.rows == [(HOSTILE, 1.0, 0.5, 1.5, 2.0, 1.75, 2.25), ("_bare", 0.0, None, None, 1.0, None, None)]
    paths = figures.plot_paths({"one": [POINT, BARE], "two": [BARE]}, name="a", xlabel="KL", ylabel="score")
    assert paths.rows == [("one", *plane.rows[0]), ("one", *plane.rows[1]), ("two", *plane.rows[1])]
    dots = figures.plot_grouped_intervals({"DPO": [POINT]}, name="a", ylabel="score")
    assert dots.rows == [("DPO", HOSTILE, 2.0, 1.75, 2.25)]
    forest = figures.plot_forest({"reward": {"b": SHARE, "a": BARE.y}, "r*": {"c": SHARE, "b": BARE.y}}, name="a")
    assert forest.columns == ("name", "reward", "reward, low", "reward, high", "r*", "r*, low", "r*, high")
    assert forest.rows == [
        ("b", 0.75, 0.5, 0.9, 1.0, None, None),
        ("a", 1.0, None, None, None, None, None),
        ("c", None, None, None, 0.75, 0.5, 0.9),
    ]
    bins, own = [BinShare("1", 3, SHARE), BinShare("2", 0, None)], {"seed 0": [BinShare("1", 2, SHARE)]}
    shares = figures.plot_shares_by_bin(bins, own, name="a", title="t", xlabel="gap", ylabel="right")
    assert shares.columns[-1] == "of"
    assert shares.rows == [
        ("1", 3, 0.75, 0.5, 0.9, ""),
        ("2", 0, None, None, None, ""),
        ("1", 2, 0.75, 0.5, 0.9, "seed 0"),
    ]
    calibration = figures.plot_calibration([(0.6, SHARE, 9)], {"seed 1": [(0.7, SHARE, 4)]}, name="a", title="t")
    assert calibration.rows == [(0.6, 9, 0.75, 0.5, 0.9, ""), (0.7, 4, 0.75, 0.5, 0.9, "seed 1")]
    curves = figures.plot_curves({"a": [(0, 1.0), (1, 2.0)]}, name="a", title="t", key_names=["a"])
    assert curves.rows == [("a", 0.0, 1.0), ("a", 1.0, 2.0)]


def test_histogram_counts_every_value_in_its_part() -> None:
    parts = {"hard": [0.0, 0.5, 1.0], "easy": [1.01, 4.0]}
    figure = figures.plot_histogram(parts, thresholds=[1.0, 1.0], name="a", xlabel="gap")
    rows = figure.rows
    assert "threshold 1<" in figure.svg
    assert "thresholds 1 to 2<" in figures.plot_histogram(parts, thresholds=[2.0, 1.0], name="a", xlabel="gap").svg
    assert figure.columns == ("gap, from", "gap, to", "hard", "easy")
    assert 1.0 in [row[0] for row in rows]  # two bins meet at the threshold
    assert all(row[3] == 0 for row in rows if row[1] <= 1.0)
    assert all(row[2] == 0 for row in rows if row[0] >= 1.0)
    assert [sum(int(row[side] or 0) for row in rows) for side in (2, 3)] == [3, 2]
    assert (rows[0][0], rows[-1][1]) == (0.0, 4.0)


def test_lines_of_many_steps_are_averaged() -> None:
    steps = [(step, float(step)) for step in range(1000)]
    figure = figures.plot_curves({"a": steps}, name="a", title="t", key_names=["a"])
    assert len(figure.rows) == figures.MAX_POINTS
    assert figure.rows[0] == ("a", 2.0, 2.0)


def test_paths_of_a_stem_share_a_colour_and_only_the_dashed_are_dashed() -> None:
    series = {"ppo, reward": [BARE, POINT], "ppo, r*": [BARE, POINT], "mpo, reward": [BARE, POINT]}
    plain = figures.plot_paths(series, **NAMES).svg
    dashed = figures.plot_paths(series, **NAMES, dashed={"ppo, r*"}).svg
    assert "stroke-dasharray" not in plain
    assert "stroke-dasharray" in dashed
    assert [colour in plain for colour in COLOURS[:3]] == [True, True, False]


def test_a_scatter_shows_and_names_every_group() -> None:
    figure = figures.plot_scatter({"easy": [(1.0, 1.0), (2.0, 2.5)], "hard": [(3.0, 2.0)]}, **NAMES)
    assert figure.rows == [("easy", 1.0, 1.0), ("easy", 2.0, 2.5), ("hard", 3.0, 2.0)]
    assert {"easy", "hard"} <= set(texts(figure))
    assert all(colour in figure.svg for colour in COLOURS[:2])


def test_no_bar_is_drawn_without_bounds() -> None:
    def bars(low: float, high: float) -> int:
        point = Point("a", BARE.x, Interval(1.0, low, high))
        return figures.plot_points([point], **NAMES).svg.count("stroke-opacity: 0.5")

    assert bars(NAN, NAN) == 0
    assert bars(0.5, 1.5) == 1


def texts(figure: Figure) -> list[str]:
    tree = ElementTree.fromstring(figure.svg)
    return ["".join(one.itertext()).strip() for one in tree.iterfind(".//{*}text")]


def test_a_plane_names_its_points_and_numbers_them_where_names_find_no_room() -> None:
    def named(count: int) -> list[str]:
        points = [Point(f"arm-{place}", exact_interval(0.0), exact_interval(0.0)) for place in range(count)]
        return texts(figures.plot_points(points, **NAMES))

    few, many = named(4), named(200)
    assert [few.count(f"arm-{place}") for place in range(4)] == [1] * 4
    assert "1" not in few
    assert "arm-0" not in many
    assert [many.count(f"{place + 1} arm-{place}") for place in range(200)] == [1] * 200


def test_numbers_stand_beside_their_points() -> None:
    alone = [Point(f"{place}", exact_interval(place), exact_interval(place)) for place in (5.0, 10.0, 20.0)]
    crowd = [Point("long " * 20, exact_interval(0.0), exact_interval(0.0))] * 30
    tree = ElementTree.fromstring(figures.plot_points([*alone, *crowd], **NAMES, sqrt_x=True).svg)
    for number, colour in zip("123", COLOURS, strict=False):
        look = f"fill: {colour}"
        mark = next(one for one in tree.iterfind(".//{*}use") if look in one.get("style", ""))
        text = next(one for one in tree.iterfind(".//{*}text") if look in one.get("style", ""))
        assert "".join(text.itertext()).strip() == number
        places = [(float(one.get("x", "nan")), float(one.get("y", "nan"))) for one in (mark, text)]
        assert math.dist(*places) < 15


def test_a_root_axis_has_round_ticks_that_stand_apart() -> None:
    points = [Point("near", exact_interval(0.5), POINT.y), Point("far", exact_interval(20.0), POINT.y)]
    found = texts(figures.plot_points(points, **NAMES, sqrt_x=True))
    assert [tick for tick in ("0", "0.2", "1", "2", "5", "10", "20") if tick not in found] == []
    ticks = plane._compute_signed_root(np.array(plane._choose_root_ticks(0.0, 100.0)))
    assert np.diff(ticks).min() > 0.07 * 10


def placed_x(figure: Figure, colour: str) -> list[float]:
    tree = ElementTree.fromstring(figure.svg)
    marks = [one for one in tree.iterfind(".//{*}use") if f"fill: {colour}" in one.get("style", "")]
    return [float(one.get("x", "nan")) for one in marks][:-1]  # without that of the legend


def test_paths_with_the_same_exact_x_stand_apart_and_their_rows_do_not_move() -> None:
    def drawn(*x: Interval) -> tuple[list[float], list[float]]:
        points = [Point("", one, POINT.y) for one in x]
        figure = figures.plot_paths({"a": points, "b": points}, **NAMES)
        assert [row[2] for row in figure.rows] == [one.mean for one in x] * 2
        one, other = (placed_x(figure, colour) for colour in COLOURS[:2])
        return one, other

    one, other = drawn(*map(exact_interval, (0.0, 0.1, 0.3)))
    assert all(left < right for left, right in zip(one, other, strict=True))
    one, other = drawn(POINT.x, Interval(2.0, 1.5, 2.5))
    assert one == other


def test_lines_keep_the_colours_of_their_shared_key() -> None:
    names = [f"arm {place}" for place in range(10)]
    svg = figures.plot_curves({names[2]: [(0, 1.0), (1, 2.0)]}, name="a", title="t", key_names=names).svg
    assert COLOURS[2] in svg
    assert COLOURS[0] not in svg
    assert names[2] not in re.sub(r"aria-label=\S+ [^>]*>", "", svg)
    key = figures.make_colour_key([*names, HOSTILE])
    swatches = re.findall(r'stroke="(\S+)".*?stroke-dasharray="([^"]*)"', key)
    assert len(set(swatches)) == 11
    assert swatches[2] == (COLOURS[2], "")
    assert "<script>" not in key
    assert all(f"</svg>{name}</li>" in key for name in names)


def test_every_arm_of_many_has_its_own_look() -> None:
    looks = {(get_colour(place), get_marker(place)) for place in range(64)}
    assert len(looks) == 64


@pytest.mark.parametrize("count", [0, 1, 25])
def test_any_number_of_arms_draws_without_warnings(count: int) -> None:
    points = [Point(f"{place} of a long name that goes on and on and on", POINT.x, POINT.y) for place in range(count)]
    assert len(figures.plot_points(points, **NAMES).rows) == count
    assert len(figures.plot_paths({"a": points}, **NAMES).rows) == count
    assert len(figures.plot_forest({"r": {point.name: point.y for point in points}}, name="a").rows) == count
    assert len(figures.plot_grouped_intervals({"a": points[:5]}, name="a", ylabel="y").rows) == min(5, count)
    assert not figures.plot_calibration([], {}, name="a", title="t").rows
