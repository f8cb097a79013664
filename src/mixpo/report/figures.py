"""Figures as SVG text that stands inside an HTML page, with the numbers that they draw: functions of plain numbers."""

import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from textwrap import wrap
from types import MappingProxyType
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from mixpo.algorithms.intervals import Interval
from mixpo.report.document import Figure
from mixpo.report.labels import Box, Label, placed

COLOURS = ("#2f7ed8", "#d9622b", "#2a9d6e", "#b8479a", "#8468d8", "#9a7b16", "#1f97a8", "#cf4453")
"""Readable on white and on near-black."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Stands for the colour of the page's text, light or dark."""
MAX_POINTS = 200
"""Points of a line; more steps than that are averaged in groups."""
MAX_LABEL = 40
"""Characters of a name in a figure; its data and its description keep the whole name."""
LEGEND_ROW = 0.17
"""Height of a row of names below a figure, in inches."""
NAME_SIZE = 8.5
"""Of the names beside points, in points of 1/72 inch."""
FOREST_ROW, FOREST_LINE = 0.19, 0.13
"""Height of a name's row, and of every further line of the name, in inches."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
}


@dataclass(frozen=True)
class Point:
    """A named place in a plane; bounds that are nan draw no bar."""

    name: str
    x: Interval
    y: Interval


@dataclass(frozen=True)
class Share:
    """A bin of pairs: its label, how many it holds, and the share that is ordered as labelled (None if empty)."""

    label: str
    count: int
    share: Interval | None


def exactly(value: float) -> Interval:
    """A value without uncertainty."""
    return Interval(float(value), float(value), float(value))


def plane(points: Sequence[Point], *, name: str, x: str, y: str, title: str = "", root: bool = False) -> Figure:
    """Arms as points with their intervals in both directions, and their names beside them.

    Where not every name finds room, numbers stand there and a key below. `root` draws x by its square root.
    """
    names = [_short(point.name) for point in points]
    with rc_context(STYLE):
        canvas, complete = _plane(points, names, x=x, y=y, title=title, root=root)
        if not complete:
            key = [f"{place} {label}" for place, label in enumerate(names, 1)]
            numbers = [f"{place}" for place, _ in enumerate(names, 1)]
            canvas, _ = _plane(points, numbers, key, x=x, y=y, title=title, root=root)
        said = "; ".join(f"{point.name}: {point.x.mean:.2f}, {point.y.mean:.2f}" for point in points)
        svg = _svg(canvas, name, _sentence(title, f"{y} against {x}", said))
    rows = [(point.name, *_numbers(point.x), *_numbers(point.y)) for point in points]
    return Figure(name, svg, ("name", *_bounds(x), *_bounds(y)), rows)


def forest(
    panels: Mapping[str, Mapping[str, Interval]], *, name: str, title: str = "", beside: str | None = None
) -> Figure:
    """A row a name, from the top in the order in which names first come, with its mean and interval in every panel.

    `panels` holds intervals by name, by what the panel measures; a name that a panel lacks has no mark there. A dotted
    line runs down from the mean of the name `beside`.
    """
    names = list(dict.fromkeys(one for panel in panels.values() for one in panel))
    folded = [_folded(one) for one in names]
    lines = [one.count("\n") + 1 for one in folded]
    ends = np.cumsum([FOREST_ROW + FOREST_LINE * (count - 1) for count in lines])
    places = ends - np.diff(ends, prepend=0.0) / 2
    height = float(ends[-1]) if names else FOREST_ROW
    with rc_context(STYLE):
        canvas = Canvas(figsize=(3.2 + 0.6 * len(panels), height + (0.75 if title else 0.55)), layout="constrained")
        every = canvas.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axes, (label, panel) in zip(every, panels.items(), strict=False):
            found = [
                Point("", panel[one], exactly(place)) for one, place in zip(names, places, strict=True) if one in panel
            ]
            _bars(axes, found, color=_colour(0), marker="o", markersize=4.5, elinewidth=1.4, capsize=0)
            if beside is not None and beside in panel:
                axes.axvline(panel[beside].mean, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
            axes.set_xlabel(label)
            axes.locator_params(axis="x", nbins=5)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        every[0].set_yticks(places, folded)
        every[0].set_ylim(height, 0.0)
        canvas.suptitle(title, fontsize=9.5)
        said = "; ".join(
            f"{label}: {', '.join(f'{one} {interval.mean:.2f}' for one, interval in panel.items())}"
            for label, panel in panels.items()
        )
        svg = _svg(canvas, name, _sentence(title, "Means with their intervals", said))
    rows = [(one, *(cell for panel in panels.values() for cell in _numbers(panel.get(one)))) for one in names]
    return Figure(name, svg, ("name", *(text for label in panels for text in _bounds(label))), rows)


def paths(
    paths: Mapping[str, Sequence[Point]], *, name: str, x: str, y: str, title: str = "", dashed: Collection[str] = ()
) -> Figure:
    """Points joined in their order; paths whose names agree up to the last comma share a colour.

    Where all have the same exact x, each is drawn a little aside of the others.
    """
    stems = list(dict.fromkeys(_stem(path) for path in paths))
    with rc_context(STYLE):
        canvas, axes = _axes(4.2, 2.9, list(paths))
        drawn = []
        apart = _apart(list(paths.values()))
        for (path, points), aside in zip(paths.items(), apart, strict=True):
            place, dash = stems.index(_stem(path)), path in dashed
            look = {"color": _colour(place), "marker": _marker(place), "markersize": 4, "linestyle": "-"}
            if dash:
                look |= {"linestyle": "--", "markerfacecolor": "none"}
            moved = [replace(point, x=_moved(point.x, aside)) for point in points]
            drawn.append(_bars(axes, moved, linewidth=1.3, elinewidth=0.7, capsize=1.5, **look))
            for point in moved:
                _beside(axes, point, _colour(place), left=place % 2 == 1, below=dash)
        if any(apart):
            axes.set_xticks(sorted({point.x.mean for points in paths.values() for point in points}))
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.margins(0.1)
        _legend(canvas, drawn, list(paths))
        ends = {path: (points[0], points[-1]) for path, points in paths.items() if points}
        said = "; ".join(
            f"{path} from {first.x.mean:.2f}, {first.y.mean:.2f} to {last.x.mean:.2f}, {last.y.mean:.2f}"
            for path, (first, last) in ends.items()
        )
        svg = _svg(canvas, name, _sentence(title, f"{y} against {x}", said))
    rows = [
        (path, point.name, *_numbers(point.x), *_numbers(point.y)) for path, points in paths.items() for point in points
    ]
    return Figure(name, svg, ("path", "point", *_bounds(x), *_bounds(y)), rows)


def scatter(groups: Mapping[str, Sequence[tuple[float, float]]], *, name: str, x: str, y: str) -> Figure:
    """Many points of a few groups, and the diagonal on which x equals y."""
    with rc_context(STYLE):
        canvas, axes = _axes(3.8, 3.1, list(groups))
        drawn = [
            axes.plot(
                [one for one, _ in points],
                [other for _, other in points],
                linestyle="",
                color=_colour(place),
                marker=_marker(place),
                markersize=3,
                alpha=0.7,
            )[0]
            for place, points in enumerate(groups.values())
        ]
        axes.axline((0, 0), slope=1, color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
        axes.set(xlabel=x, ylabel=y)
        _legend(canvas, drawn, list(groups))
        said = "; ".join(f"{group}: {len(points)} points" for group, points in groups.items())
        svg = _svg(canvas, name, _sentence("", f"{y} against {x}", said))
    rows = [(group, _number(one), _number(other)) for group, points in groups.items() for one, other in points]
    return Figure(name, svg, ("group", x, y), rows)


def dots(groups: Mapping[str, Sequence[Point]], *, name: str, y: str, title: str = "") -> Figure:
    """Intervals in y by the points' names, groups side by side."""
    names = list(dict.fromkeys(point.name for points in groups.values() for point in points))
    with rc_context(STYLE):
        canvas, axes = _axes(4.2, 2.7, list(groups))
        drawn = []
        for place, points in enumerate(groups.values()):
            aside = (place - (len(groups) - 1) / 2) * min(0.2, 0.7 / len(groups))
            moved = [_at(names.index(point.name) + aside, point.y) for point in points]
            drawn.append(_bars(axes, moved, color=_colour(place), marker=_marker(place), capsize=3, markersize=6))
        axes.set_xticks(range(len(names)), [_short(one) for one in names])
        axes.set_xlim(-0.5, max(0, len(names) - 1) + 0.5)
        axes.grid(axis="x", visible=False)
        axes.set(title=title, ylabel=y)
        _legend(canvas, drawn, list(groups))
        said = "; ".join(
            f"{group}: {', '.join(f'{point.name} {point.y.mean:.2f}' for point in points)}"
            for group, points in groups.items()
        )
        svg = _svg(canvas, name, _sentence(title, y, said))
    rows = [(group, point.name, *_numbers(point.y)) for group, points in groups.items() for point in points]
    return Figure(name, svg, ("group", "name", *_bounds(y)), rows)


def shares(
    bins: Sequence[Share],
    *,
    name: str,
    title: str,
    x: str,
    y: str,
    each: Mapping[str, Sequence[Share]] = MappingProxyType({}),
) -> Figure:
    """Shares by bin with their intervals, and the count of each bin below it; thin lines are of the parts in `each`."""
    with rc_context(STYLE):
        canvas, axes = _axes(4.2, 2.9)
        for part in each.values():
            found = [(place, one.share.mean) for place, one in enumerate(part) if one.share is not None]
            _thin(axes, found)
        filled = [(place, one.share) for place, one in enumerate(bins) if one.share is not None]
        line = {"linestyle": "-" if each else ""}
        _bars(axes, [_at(place, share) for place, share in filled], color=_colour(0), marker="o", capsize=3, **line)
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axes.set_xticks(range(len(bins)), [f"{one.label}\nn={one.count}" for one in bins])
        axes.set_xlim(-0.5, max(0, len(bins) - 1) + 0.5)
        axes.set_ylim(0.0, 1.05)
        axes.grid(axis="x", visible=False)
        axes.set(title=title, xlabel=x, ylabel=y)
        said = "; ".join(f"{bins[place].label}: {share.mean:.2f} of {bins[place].count}" for place, share in filled)
        svg = _svg(canvas, name, _sentence(title, f"{y} by {x}", said))
    rows = [
        (one.label, one.count, *_numbers(one.share), part) for part, own in {"": bins, **each}.items() for one in own
    ]
    return Figure(name, svg, (x, "count", *_bounds(y), "of"), rows)


Bin = tuple[float, Interval, int]
"""The confidence predicted, the share observed, and the number of pairs."""


def calibration(
    bins: Sequence[Bin], *, name: str, title: str, each: Mapping[str, Sequence[Bin]] = MappingProxyType({})
) -> Figure:
    """The share observed against the confidence predicted, larger where a bin holds more; dotted where they agree.

    Thin lines are of the parts in `each`.
    """
    x, y = "predicted confidence", "observed share"
    with rc_context(STYLE):
        canvas, axes = _axes(4.2, 2.9)
        for part in each.values():
            _thin(axes, [(predicted, share.mean) for predicted, share, _ in part])
        most = max((count for _, _, count in bins), default=1)
        for predicted, share, count in bins:
            size = 3 + 6 * math.sqrt(count / max(1, most))
            point = _at(predicted, share)
            _bars(axes, [point], color=_colour(0), marker="o", capsize=2, elinewidth=1, markersize=size)
            _beside(axes, Point(f"n={count}", point.x, share), INK, left=False, below=True)
        low = 0.5 if bins and min(predicted for predicted, _, _ in bins) >= 0.5 else 0.0
        seen = [share.low for _, share, _ in bins] + [share.mean for part in each.values() for _, share, _ in part]
        least = min([low, *filter(math.isfinite, seen)])
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
        axes.set(title=title, xlabel=x, ylabel=y, xlim=(low - 0.01, 1.04), ylim=(least - 0.02, 1.04))
        said = "; ".join(f"{predicted:.2f}: {share.mean:.2f} of {count}" for predicted, share, count in bins)
        svg = _svg(canvas, name, _sentence(title, f"{y} by {x}", said))
    rows = [
        (_number(predicted), count, *_numbers(share), part)
        for part, own in {"": bins, **each}.items()
        for predicted, share, count in own
    ]
    return Figure(name, svg, (x, "count", *_bounds(y), "of"), rows)


def histogram(parts: Mapping[str, Sequence[float]], *, cuts: Sequence[float], name: str, x: str) -> Figure:
    """How often values fall where, the parts on top of each other, and the thresholds between them."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(values, float) for values in parts.values()]), bins=40)
    counts = {part: np.histogram(values, bins=edges)[0] for part, values in parts.items()}
    cuts = sorted(set(cuts))
    said = f"threshold {min(cuts):.3g}" if len(cuts) == 1 else f"thresholds {min(cuts):.3g} to {max(cuts):.3g}"
    with rc_context(STYLE):
        canvas, axes = _axes(4.8, 2.8)
        below = np.zeros(len(edges) - 1)
        for part, found in counts.items():
            axes.bar(edges[:-1], found, np.diff(edges), below, align="edge", alpha=0.85, label=part)
            below += found
        for place, cut in enumerate(cuts):
            label = "" if place else said
            axes.axvline(cut, color=INK, linewidth=1.2 / len(cuts) ** 0.5, linestyle="--", label=label)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=x, ylabel="pairs")
        canvas.legend(loc="outside lower center", ncols=3)
        sums = ", ".join(f"{found.sum()} {part}" for part, found in counts.items())
        svg = _svg(canvas, name, f"Histogram of {int(below.sum())} values of {x}: {sums}; {said}")
    columns = [edges[:-1].tolist(), edges[1:].tolist(), *(found.tolist() for found in counts.values())]
    return Figure(name, svg, (f"{x}, from", f"{x}, to", *parts), list(zip(*columns, strict=True)))


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    name: str,
    title: str,
    x: str = "step",
    shared: Sequence[str] = (),
) -> Figure:
    """Values by step. The names stand below, or in the `key` of all the names `shared` by several figures."""
    thinned = {line: _thinned(points) for line, points in series.items()}
    places = [list(shared or series).index(line) for line in series]
    below = list(series) if len(series) > 1 and not shared else []
    with rc_context(STYLE):
        canvas, axes = _axes(2.9, 1.9, below)
        drawn = []
        for place, points in zip(places, thinned.values(), strict=True):
            steps, values = [step for step, _ in points], [value for _, value in points]
            look = {"color": _colour(place), "linestyle": (0, _dashes(place) or None), "linewidth": 1.3}
            drawn += axes.plot(steps, values, marker="" if len(steps) > 1 else "o", **look)
        axes.set_title(title, loc="left")
        axes.set_xlabel(x, fontsize=8)
        axes.locator_params(nbins=5)
        if below:
            _legend(canvas, drawn, below)
        said = "; ".join(
            f"{line} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in series.items() if points
        )
        svg = _svg(canvas, name, f"{title} by {x}: {said}")
    rows = [(line, _number(step), _number(value)) for line, points in thinned.items() for step, value in points]
    return Figure(name, svg, ("line", x, "value"), rows)


def key(names: Sequence[str]) -> Markup:
    """Whose line has which colour, as a list, for figures that share it."""
    entry = Markup(
        '<li><svg viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4h24" fill="none" stroke="{}" stroke-width="2.5" '
        'stroke-dasharray="{}"/></svg>{}</li>'
    )
    entries = [
        entry.format(_colour(place), " ".join(f"{2.5 * length:g}" for length in _dashes(place)), _short(name))
        for place, name in enumerate(names)
    ]
    return Markup('<ul class="key">') + Markup("").join(entries) + Markup("</ul>")


def _axes(width: float, height: float, labels: Sequence[str] = ()) -> tuple[Any, Any]:
    """A canvas that is higher by the rows of its legend."""
    rows = -(-len(labels) // _columns(width, labels))
    canvas = Canvas(figsize=(width, height + rows * LEGEND_ROW), layout="constrained", dpi=72)
    return canvas, canvas.add_subplot()


def _plane(
    points: Sequence[Point], texts: Sequence[str], key: Sequence[str] = (), *, x: str, y: str, title: str, root: bool
) -> tuple[Any, bool]:
    """A plane with those of the texts that find room beside their points; whether all do."""
    canvas, axes = _axes(4.2, 3.4, key)
    drawn = [
        _bars(axes, [point], color=_colour(place), marker=_marker(place), markersize=5.5, elinewidth=1, capsize=0)
        for place, point in enumerate(points)
    ]
    for one in drawn:
        for bar in one[2]:
            bar.set_alpha(0.5)
    if root:
        axes.set_xscale("function", functions=(_root, _square))
    axes.set(title=title, xlabel=f"{x}, root scale" if root else x, ylabel=y)
    axes.margins(0.08)
    if root:
        ticks = _root_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if key:
        _legend(canvas, drawn, key)
    with _of_any_script():
        canvas.savefig(
            io.BytesIO(), format="svg"
        )  # lays it out as it will be drawn: no other renderer measures text alike
    seen = [place for place, one in enumerate(points) if math.isfinite(one.x.mean) and math.isfinite(one.y.mean)]
    found = placed(
        [_spot(axes, points[place].x.mean, points[place].y.mean) for place in seen],
        [(NAME_SIZE * 0.57 * len(texts[place]), NAME_SIZE * 1.15) for place in seen],
        frame=Box(*axes.bbox.extents),
        lines=[line for place in seen for line in _crosses(axes, points[place])],
    )
    for place, label in zip(seen, found, strict=True):
        if label is not None:
            _write(axes, texts[place], label, _colour(place))
    return canvas, all(label is not None for label in found)


def _spot(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Where a place of the plane stands on the canvas, in points of 1/72 inch."""
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def _crosses(axes: Any, point: Point) -> list[Box]:
    """What a point's error bars cover."""
    x, y = point.x, point.y
    bars = [((x.low, y.mean), (x.high, y.mean)), ((x.mean, y.low), (x.mean, y.high))]
    known = [[_spot(axes, *end) for end in ends] for ends in bars if np.isfinite(ends).all()]
    return [Box(left - 0.5, bottom - 0.5, right + 0.5, top + 0.5) for (left, bottom), (right, top) in known]


def _write(axes: Any, text: str, label: Label, colour: str) -> None:
    """A name where it was placed, and the line that leads to it."""
    inches = axes.figure.dpi_scale_trans
    box = label.box
    x, align = {1: (box.left, "left"), 0: ((box.left + box.right) / 2, "center"), -1: (box.right, "right")}[label.side]
    look = {"transform": inches, "color": colour, "fontsize": NAME_SIZE, "ha": align, "va": "center"}
    axes.text(x / 72, (box.bottom + box.top) / 144, text, **look).set_in_layout(False)
    if label.leader is not None:
        (x, y), (to_x, to_y) = label.leader
        line = Line2D([x / 72, to_x / 72], [y / 72, to_y / 72], transform=inches, color=colour, linewidth=0.6)
        line.set(alpha=0.6, zorder=1.5, in_layout=False)
        axes.add_artist(line)


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def _root_ticks(low: float, high: float) -> list[float]:
    """0, and of 1, 2 and 5 times powers of ten those that stand apart on an axis of square roots."""
    apart = 0.075 * (_root(high) - _root(low))
    ticks: list[float] = []
    for tick in sorted((digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)), reverse=True):
        nearest = ticks[-1] if ticks else math.inf
        if tick <= high and _root(nearest) - _root(tick) >= apart and _root(tick) >= apart:
            ticks.append(tick)
    return [*(-tick for tick in ticks if -tick >= low), 0.0, *reversed(ticks)]


def _columns(width: float, labels: Sequence[str]) -> int:
    """Names that fit beside each other below a figure of that many inches."""
    longest = max((len(_short(label)) for label in labels), default=0)
    most = max(1, min(5, len(labels), int(width * 72 / (5.2 * longest + 32))))
    rows = max(1, -(-len(labels) // most))
    return max(1, -(-len(labels) // rows))


def _legend(canvas: Any, drawn: Sequence[Any], labels: Sequence[str]) -> None:
    if drawn:
        columns = _columns(canvas.get_figwidth(), labels)
        canvas.legend(
            [getattr(one, "lines", [one])[0] for one in drawn],  # of a line itself, of error bars theirs
            [_short(label) for label in labels],
            loc="outside lower center",
            ncols=columns,
        )


def _bars(axes: Any, points: Sequence[Point], **look: Any) -> Any:
    """Points with an error bar in each direction that has bounds."""
    x, y = [point.x for point in points], [point.y for point in points]
    look = {"linestyle": "", **look}
    means = [one.mean for one in x], [one.mean for one in y]
    return axes.errorbar(*means, xerr=_lengths(x), yerr=_lengths(y), **look)


def _thin(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """A line that stands behind what counts."""
    axes.plot([x for x, _ in points], [y for _, y in points], color=_colour(0), linewidth=0.8, alpha=0.55)


def _apart(paths: Sequence[Sequence[Point]]) -> list[float]:
    """What each path is drawn aside by, so that bars at the same exact x do not cover each other."""
    x = sorted({point.x.mean for points in paths for point in points})
    exact = all(point.x.low == point.x.high for points in paths for point in points)
    if not exact or len(x) < 2 or max(map(len, paths)) < len(x):
        return [0.0] * len(paths)
    step = min(0.015 * (x[-1] - x[0]), 0.4 * float(np.diff(x).min()) / len(paths))
    return [step * (place - (len(paths) - 1) / 2) for place in range(len(paths))]


def _moved(interval: Interval, by: float) -> Interval:
    return Interval(interval.mean + by, interval.low + by, interval.high + by)


def _lengths(intervals: Sequence[Interval]) -> list[list[float]] | None:
    """Lengths of error bars down and up; nan where there are no bounds, None where no point has any."""
    down = [max(0.0, one.mean - one.low) if math.isfinite(one.low) else math.nan for one in intervals]
    up = [max(0.0, one.high - one.mean) if math.isfinite(one.high) else math.nan for one in intervals]
    return None if all(map(math.isnan, down + up)) else [down, up]


def _beside(axes: Any, point: Point, colour: str, *, left: bool, below: bool) -> None:
    if point.name and math.isfinite(point.x.mean) and math.isfinite(point.y.mean):
        axes.annotate(
            _short(point.name),
            (point.x.mean, point.y.mean),
            xytext=(-4 if left else 4, -4 if below else 4),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if below else "bottom",
            color=colour,
            fontsize=7.5,
        )


def _at(place: float, y: Interval) -> Point:
    return Point("", Interval(float(place), math.nan, math.nan), y)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _marker(place: int) -> str:
    """Unlike that of the last arm of the same colour."""
    return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _dashes(place: int) -> tuple[float, ...]:
    """Lengths of dashes and gaps that tell lines of the same colour apart; none of a solid line."""
    return ((), (4.0, 1.5), (1.0, 1.5))[place // len(COLOURS) % 3]


def _stem(path: str) -> str:
    return path.rpartition(", ")[0] or path


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


def _folded(label: str) -> str:
    """A name in lines of few words."""
    return "\n".join(wrap(_short(label), 18, break_long_words=False, break_on_hyphens=False))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    if interval is None:
        return None, None, None
    return _number(interval.mean), _number(interval.low), _number(interval.high)


def _bounds(label: str) -> tuple[str, str, str]:
    return label, f"{label}, low", f"{label}, high"


def _sentence(title: str, what: str, said: str) -> str:
    return f"{title}: {what}. {said}" if title else f"{what}. {said}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(1, -(-len(points) // MAX_POINTS))
    groups = [np.asarray(points[start : start + size]) for start in range(0, len(points), size)]
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


@contextmanager
def _of_any_script() -> Iterator[None]:
    """No warning of what matplotlib's own font lacks: the page's fonts draw the text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _svg(canvas: Any, name: str, description: str) -> Markup:
    """The figure as an `svg` element that scales with the page and takes its text's colour."""
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}), _of_any_script():
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    width = float(view[1].split()[2]) * 1.6
    label = escape(description, quote=True)
    head = f'<svg {spaces} viewBox="{view[1]}" style="max-width: {width:.0f}px" role="img" aria-label="{label}">'
    return Markup(head + body.strip())
