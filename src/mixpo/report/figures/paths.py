"""Points joined in their order, and groups of many points."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, replace

import numpy as np
from matplotlib import rc_context

from mixpo.algorithms.intervals import Interval
from mixpo.report.document import Figure
from mixpo.report.figures.axes import add_legend_below, annotate_point, draw_error_bars, make_axes
from mixpo.report.figures.data import Point, flatten_point, keep_finite, split_heading
from mixpo.report.figures.style import INK, STYLE, get_colour, get_marker
from mixpo.report.figures.svg import render_svg


@rc_context(STYLE)
def plot_paths(
    paths: Mapping[str, Sequence[Point]], *, name: str, xlabel: str, ylabel: str, dashed: Collection[str] = ()
) -> Figure:
    """A figure of points joined in their order; paths whose names agree up to the last comma share a colour."""
    stems = {path: path.rpartition(", ")[0] or path for path in paths}
    colours = list(dict.fromkeys(stems.values()))
    canvas, axes = make_axes(4.2, 2.9, list(paths))
    artists = []
    offsets = _compute_x_offsets(list(paths.values()))
    for (path, points), offset in zip(paths.items(), offsets, strict=True):
        i = colours.index(stems[path])
        look = {"color": get_colour(i), "marker": get_marker(i), "markersize": 4, "linestyle": "-"}
        if path in dashed:
            look |= {"linestyle": "--", "markerfacecolor": "none"}
        moved = [replace(point, x=Interval(*(value + offset for value in astuple(point.x)))) for point in points]
        artists.append(draw_error_bars(axes, moved, linewidth=1.3, elinewidth=0.7, capsize=1.5, **look))
        for point in moved:
            annotate_point(axes, point, get_colour(i), left=i % 2 == 1, below=path in dashed)
    if any(offsets):
        axes.set_xticks(sorted({point.x.mean for points in paths.values() for point in points}))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.1)
    add_legend_below(canvas, artists, list(paths))
    ends = {path: (points[0], points[-1]) for path, points in paths.items() if points}
    values = "; ".join(
        f"{path} from {first.x.mean:.2f}, {first.y.mean:.2f} to {last.x.mean:.2f}, {last.y.mean:.2f}"
        for path, (first, last) in ends.items()
    )
    svg = render_svg(canvas, name, f"{ylabel} against {xlabel}. {values}")
    rows = [(path, *flatten_point(point)) for path, points in paths.items() for point in points]
    return Figure(name, svg, ("path", "point", *split_heading(xlabel), *split_heading(ylabel)), rows)


@rc_context(STYLE)
def plot_scatter(groups: Mapping[str, Sequence[tuple[float, float]]], *, name: str, xlabel: str, ylabel: str) -> Figure:
    """A figure of (x, y) points by group, with the diagonal x = y."""
    canvas, axes = make_axes(3.8, 3.1, list(groups))
    artists = []
    for i, points in enumerate(groups.values()):
        look = {"linestyle": "", "color": get_colour(i), "marker": get_marker(i), "markersize": 3, "alpha": 0.7}
        artists += axes.plot([point[0] for point in points], [point[1] for point in points], **look)
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    add_legend_below(canvas, artists, list(groups))
    values = "; ".join(f"{group}: {len(points)} points" for group, points in groups.items())
    svg = render_svg(canvas, name, f"{ylabel} against {xlabel}. {values}")
    rows = [(group, *map(keep_finite, point)) for group, points in groups.items() for point in points]
    return Figure(name, svg, ("group", xlabel, ylabel), rows)


def _compute_x_offsets(paths: Sequence[Sequence[Point]]) -> list[float]:
    """A shift in x for each path, so that error bars at the same exact x stand apart; zeros if the x differ."""
    x = sorted({point.x.mean for points in paths for point in points})
    exact = all(point.x.low == point.x.high for points in paths for point in points)
    if not exact or len(x) < 2 or max(map(len, paths)) < len(x):
        return [0.0] * len(paths)
    step = min(0.015 * (x[-1] - x[0]), 0.4 * float(np.diff(x).min()) / len(paths))
    return [step * (i - (len(paths) - 1) / 2) for i in range(len(paths))]
