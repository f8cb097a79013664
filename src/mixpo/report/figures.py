"""Figures as SVG text that stands inside an HTML page, with the numbers that they draw: functions of plain numbers."""

import io
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from mixpo.algorithms.statistics import Interval
from mixpo.report.document import Figure

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


def plane(points: Sequence[Point], *, name: str, x: str, y: str, title: str = "") -> Figure:
    """Arms as points with their intervals in both directions."""
    labels = [point.name for point in points]
    with rc_context(STYLE):
        canvas, axes = _axes(4.8, 3.1, labels)
        drawn = [
            _bars(axes, [point], color=_colour(place), marker=_marker(place), capsize=3, markersize=6)
            for place, point in enumerate(points)
        ]
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.margins(0.1)
        _legend(canvas, drawn, labels)
        said = "; ".join(f"{point.name}: {point.x.mean:.2f}, {point.y.mean:.2f}" for point in points)
        svg = _svg(canvas, name, _sentence(title, f"{y} against {x}", said))
    rows = [(point.name, *_numbers(point.x), *_numbers(point.y)) for point in points]
    return Figure(name, svg, ("name", *_bounds(x), *_bounds(y)), rows)


def paths(
    paths: Mapping[str, Sequence[Point]], *, name: str, x: str, y: str, title: str = "", dashed: Collection[str] = ()
) -> Figure:
    """Points joined in their order; paths whose names agree up to the last comma share a colour."""
    stems = list(dict.fromkeys(_stem(path) for path in paths))
    with rc_context(STYLE):
        canvas, axes = _axes(4.8, 3.1, list(paths))
        drawn = []
        for path, points in paths.items():
            place, dash = stems.index(_stem(path)), path in dashed
            look = {"color": _colour(place), "marker": _marker(place), "markersize": 4, "linestyle": "-"}
            if dash:
                look |= {"linestyle": "--", "markerfacecolor": "none"}
            drawn.append(_bars(axes, points, linewidth=1.3, elinewidth=0.7, capsize=1.5, **look))
            for point in points:
                _beside(axes, point, _colour(place), left=place % 2 == 1, below=dash)
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


def shares(bins: Sequence[Share], *, name: str, title: str, x: str, y: str) -> Figure:
    """Shares by bin with their intervals, and the count of each bin below it."""
    with rc_context(STYLE):
        canvas, axes = _axes(4.2, 2.9)
        filled = [(place, one.share) for place, one in enumerate(bins) if one.share is not None]
        _bars(axes, [_at(place, share) for place, share in filled], color=_colour(0), marker="o", capsize=3)
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axes.set_xticks(range(len(bins)), [f"{one.label}\nn={one.count}" for one in bins])
        axes.set_xlim(-0.5, max(0, len(bins) - 1) + 0.5)
        axes.set_ylim(0.0, 1.05)
        axes.grid(axis="x", visible=False)
        axes.set(title=title, xlabel=x, ylabel=y)
        said = "; ".join(f"{bins[place].label}: {share.mean:.2f} of {bins[place].count}" for place, share in filled)
        svg = _svg(canvas, name, _sentence(title, f"{y} by {x}", said))
    rows = [(one.label, one.count, *_numbers(one.share)) for one in bins]
    return Figure(name, svg, (x, "count", *_bounds(y)), rows)


def calibration(bins: Sequence[tuple[float, Interval, int]], *, name: str, title: str) -> Figure:
    """The share observed against the confidence predicted, larger where a bin holds more; dotted where they agree."""
    x, y = "predicted confidence", "observed share"
    with rc_context(STYLE):
        canvas, axes = _axes(3.8, 3.1)
        most = max((count for _, _, count in bins), default=1)
        for predicted, share, count in bins:
            size = 3 + 6 * math.sqrt(count / max(1, most))
            point = _at(predicted, share)
            _bars(axes, [point], color=_colour(0), marker="o", capsize=2, elinewidth=1, markersize=size)
            _beside(axes, Point(f"n={count}", point.x, share), INK, left=False, below=True)
        low = 0.5 if bins and min(predicted for predicted, _, _ in bins) >= 0.5 else 0.0
        least = min((share.low for _, share, _ in bins if share.low < low), default=low)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
        axes.set(title=title, xlabel=x, ylabel=y, xlim=(low - 0.01, 1.04), ylim=(least - 0.02, 1.04))
        said = "; ".join(f"{predicted:.2f}: {share.mean:.2f} of {count}" for predicted, share, count in bins)
        svg = _svg(canvas, name, _sentence(title, f"{y} by {x}", said))
    rows = [(_number(predicted), count, *_numbers(share)) for predicted, share, count in bins]
    return Figure(name, svg, (x, "count", *_bounds(y)), rows)


def histogram(values: Sequence[float], *, cut: float, name: str, x: str, left: str, right: str) -> Figure:
    """How often values fall where, and the cut between those on the left and those on the right."""
    array = np.asarray(values, dtype=np.float64)
    edges = np.histogram_bin_edges(array, bins=40)
    below, above = (np.histogram(part, bins=edges)[0] for part in (array[array <= cut], array[array > cut]))
    with rc_context(STYLE):
        canvas, axes = _axes(4.8, 2.8)
        look = {"width": np.diff(edges), "align": "edge", "alpha": 0.85}
        axes.bar(edges[:-1], below, label=left, **look)
        axes.bar(edges[:-1], above, bottom=below, label=right, **look)
        axes.axvline(cut, color=INK, linewidth=1.2, linestyle="--", label=f"threshold {cut:.3g}")
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=x, ylabel="pairs")
        canvas.legend(loc="outside lower center", ncols=3)
        said = f"Histogram of {len(values)} values of {x}: {below.sum()} {left}, {above.sum()} {right}"
        svg = _svg(canvas, name, f"{said}, with the threshold at {cut:.3g}")
    rows = [
        (float(low), float(high), int(one), int(other))
        for low, high, one, other in zip(edges[:-1], edges[1:], below, above, strict=True)
    ]
    return Figure(name, svg, (f"{x}, from", f"{x}, to", left, right), rows)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, name: str, title: str, x: str = "step") -> Figure:
    """Values by step."""
    thinned = {line: _thinned(points) for line, points in series.items()}
    with rc_context(STYLE):
        canvas, axes = _axes(2.9, 1.9)
        drawn = []
        for points in thinned.values():
            steps, values = [step for step, _ in points], [value for _, value in points]
            drawn += axes.plot(steps, values, linewidth=1.3, marker="" if len(steps) > 1 else "o")
        axes.set_title(title, loc="left")
        axes.set_xlabel(x, fontsize=8)
        axes.locator_params(nbins=5)
        if len(series) > 1:
            axes.legend(drawn, [_short(line) for line in series], fontsize=8)
        said = "; ".join(
            f"{line} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in series.items() if points
        )
        svg = _svg(canvas, name, f"{title} by {x}: {said}")
    rows = [(line, _number(step), _number(value)) for line, points in thinned.items() for step, value in points]
    return Figure(name, svg, ("line", x, "value"), rows)


def _axes(width: float, height: float, labels: Sequence[str] = ()) -> tuple[Any, Any]:
    """A canvas that is higher by the rows of its legend."""
    rows = -(-len(labels) // _columns(width, labels))
    canvas = Canvas(figsize=(width, height + rows * LEGEND_ROW), layout="constrained")
    return canvas, canvas.add_subplot()


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


def _stem(path: str) -> str:
    return path.rpartition(", ")[0] or path


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


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


def _svg(canvas: Any, name: str, description: str) -> Markup:
    """The figure as an `svg` element that scales with the page and takes its text's colour."""
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's own fonts draw the text
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
