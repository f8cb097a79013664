"""Figures as SVG text that stands inside an HTML page: small functions of plain numbers."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from mixpo.algorithms.statistics import Interval

COLOURS = ("#2f7ed8", "#d9622b", "#2a9d6e", "#b8479a", "#8468d8", "#9a7b16", "#1f97a8", "#cf4453")
"""Readable on white and on near-black."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Stands for the colour of the page's text, light or dark."""
MAX_POINTS = 200
"""Points of a line; more steps than that are averaged in groups."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
}


@dataclass(frozen=True)
class Point:
    """An arm in a plane."""

    name: str
    x: Interval
    y: Interval


@dataclass(frozen=True)
class Share:
    """A bin of pairs: its label, how many it holds, and the share that is ordered as labelled (None if empty)."""

    label: str
    count: int
    share: Interval | None


def plane(points: Sequence[Point], *, x: str, y: str) -> str:
    """Arms as points with their intervals in both directions."""
    with rc_context(STYLE):
        figure, axes = _axes(4.8, 3.6)
        for place, point in enumerate(points):
            axes.errorbar(
                [point.x.mean],
                [point.y.mean],
                xerr=_bars([point.x]),
                yerr=_bars([point.y]),
                fmt=MARKERS[place % len(MARKERS)],
                color=COLOURS[place % len(COLOURS)],
                capsize=3,
                markersize=6,
                label=point.name,
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(0.1)
        figure.legend(loc="outside lower center", ncols=min(5, max(1, len(points))))
        said = "; ".join(f"{point.name}: {point.x.mean:.2f}, {point.y.mean:.2f}" for point in points)
        return _svg(figure, f"{y} against {x}. {said}")


def shares(bins: Sequence[Share], *, title: str, x: str, y: str) -> str:
    """Shares by bin with their intervals, and the count of each bin below it."""
    with rc_context(STYLE):
        figure, axes = _axes(4.2, 2.9)
        filled = [(place, one.share) for place, one in enumerate(bins) if one.share is not None]
        axes.errorbar(
            [place for place, _ in filled],
            [share.mean for _, share in filled],
            yerr=_bars([share for _, share in filled]),
            fmt="o",
            capsize=3,
        )
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axes.set_xticks(range(len(bins)), [f"{one.label}\nn={one.count}" for one in bins])
        axes.set_ylim(0.0, 1.05)
        axes.grid(axis="x", visible=False)
        axes.set(title=title, xlabel=x, ylabel=y)
        said = "; ".join(f"{bins[place].label}: {share.mean:.2f} of {bins[place].count}" for place, share in filled)
        return _svg(figure, f"{title}: {y} by {x}. {said}")


def histogram(values: Sequence[float], *, cut: float, x: str, left: str, right: str) -> str:
    """How often values fall where, and the cut between those on the left and those on the right."""
    with rc_context(STYLE):
        figure, axes = _axes(4.8, 2.8)
        edges = np.histogram_bin_edges(np.asarray(values, dtype=np.float64), bins=40)
        axes.hist([value for value in values if value <= cut], bins=edges, label=left, alpha=0.85)
        axes.hist([value for value in values if value > cut], bins=edges, label=right, alpha=0.85)
        axes.axvline(cut, color=INK, linewidth=1.2, linestyle="--", label=f"threshold {cut:.3g}")
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=x, ylabel="pairs")
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, f"Histogram of {len(values)} values of {x}, with the threshold at {cut:.3g}")


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> str:
    """Values by step."""
    with rc_context(STYLE):
        figure, axes = _axes(2.9, 1.9)
        for name, points in series.items():
            steps, values = zip(*_thinned(points), strict=True)
            axes.plot(steps, values, linewidth=1.3, label=name, marker="" if len(steps) > 1 else "o")
        axes.set_title(title, loc="left")
        axes.locator_params(nbins=5)
        if len(series) > 1:
            axes.legend(fontsize=8)
        said = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series.items())
        return _svg(figure, f"{title} by step: {said}")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths of error bars down and up; none where there are no bounds."""
    down = [one.mean - one.low for one in intervals]
    up = [one.high - one.mean for one in intervals]
    return [[0.0 if math.isnan(length) else max(0.0, length) for length in lengths] for lengths in (down, up)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MAX_POINTS)
    groups = [np.asarray(points[start : start + size]) for start in range(0, len(points), size)]
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


def _svg(figure: Any, description: str) -> str:
    """The figure as an `svg` element that scales with the page and takes its text's colour."""
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    width = view[1].split()[2]
    label = escape(description, quote=True)
    style = f"max-width: {float(width) * 1.6:.0f}px"
    return f'<svg viewBox="{view[1]}" style="{style}" role="img" aria-label="{label}">{body.strip()}'
