"""Training curves, and the colour key that several figures of curves share."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context

from mixpo.report.document import Figure
from mixpo.report.figures.axes import make_axes
from mixpo.report.figures.data import keep_finite
from mixpo.report.figures.style import STYLE, get_colour, get_dashes, shorten_label
from mixpo.report.figures.svg import render_svg

MAX_POINTS = 200
"""Points of a curve; more steps than that are averaged in groups."""


@rc_context(STYLE)
def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, name: str, title: str, key_names: Sequence[str]
) -> Figure:
    """A figure of (step, value) curves, averaged to 200 points; a curve's place in `key_names` sets its colour."""
    averaged = {line: _average_consecutive_points(points) for line, points in curves.items()}
    canvas, axes = make_axes(2.9, 1.9)
    for line, points in averaged.items():
        i = key_names.index(line)
        look = {"color": get_colour(i), "linestyle": (0, get_dashes(i) or None), "linewidth": 1.3}
        axes.plot(*zip(*points, strict=True), marker="" if len(points) > 1 else "o", **look)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.locator_params(nbins=5)
    ends = "; ".join(f"{line} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in curves.items())
    rows = [(line, *map(keep_finite, point)) for line, points in averaged.items() for point in points]
    svg = render_svg(canvas, name, f"{title} by step: {ends}")
    return Figure(name, svg, ("line", "step", "value"), rows)


def make_colour_key(names: Sequence[str]) -> Markup:
    """An HTML list with the colour, dashes and name of every curve: one legend for several figures."""
    item = Markup(
        '<li><svg viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4h24" fill="none" stroke="{}" stroke-width="2.5" '
        'stroke-dasharray="{}"/></svg>{}</li>'
    )
    items = [
        item.format(get_colour(i), " ".join(f"{2.5 * length:g}" for length in get_dashes(i)), shorten_label(name))
        for i, name in enumerate(names)
    ]
    return Markup('<ul class="key">') + Markup("").join(items) + Markup("</ul>")


def _average_consecutive_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 200 (x, y) points, each the mean of consecutive ones."""
    size = max(1, -(-len(points) // MAX_POINTS))
    groups = [np.asarray(points[start : start + size]) for start in range(0, len(points), size)]
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]
