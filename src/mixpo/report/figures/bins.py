"""Shares by bin, calibration, and the histogram of gaps with its threshold."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib import rc_context

from mixpo.report.document import Figure
from mixpo.report.figures.axes import annotate_point, draw_error_bars, draw_thin_line, make_axes
from mixpo.report.figures.data import Bin, BinShare, Point, keep_finite, make_y_point, split_heading, split_interval
from mixpo.report.figures.style import INK, STYLE, get_colour
from mixpo.report.figures.svg import render_svg

HISTOGRAM_BINS = 40


@rc_context(STYLE)
def plot_shares_by_bin(
    bins: Sequence[BinShare],
    seed_bins: Mapping[str, Sequence[BinShare]],
    *,
    name: str,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """A figure of the share ordered as labelled in each bin, with its interval and count; a thin line for each seed."""
    canvas, axes = make_axes(4.2, 2.9)
    for part in seed_bins.values():
        draw_thin_line(axes, [(i, item.share.mean) for i, item in enumerate(part) if item.share is not None])
    filled = [(i, item.share) for i, item in enumerate(bins) if item.share is not None]
    points = [make_y_point(i, share) for i, share in filled]
    draw_error_bars(axes, points, color=get_colour(0), marker="o", capsize=3, linestyle="-" if seed_bins else "")
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
    axes.set_xticks(range(len(bins)), [f"{item.label}\nn={item.count}" for item in bins])
    axes.set_xlim(-0.5, max(0, len(bins) - 1) + 0.5)
    axes.set_ylim(0.0, 1.05)
    axes.grid(axis="x", visible=False)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    values = "; ".join(f"{bins[i].label}: {share.mean:.2f} of {bins[i].count}" for i, share in filled)
    svg = render_svg(canvas, name, f"{title}: {ylabel} by {xlabel}. {values}")
    rows = [
        (item.label, item.count, *split_interval(item.share), part)
        for part, items in {"": bins, **seed_bins}.items()
        for item in items
    ]
    return Figure(name, svg, (xlabel, "count", *split_heading(ylabel), "of"), rows)


@rc_context(STYLE)
def plot_calibration(bins: Sequence[Bin], seed_bins: Mapping[str, Sequence[Bin]], *, name: str, title: str) -> Figure:
    """A figure of observed share against predicted confidence, larger marks for larger bins, thin lines for seeds."""
    x, y = "predicted confidence", "observed share"
    canvas, axes = make_axes(4.2, 2.9)
    for part in seed_bins.values():
        draw_thin_line(axes, [(predicted, share.mean) for predicted, share, _ in part])
    largest = max((count for _, _, count in bins), default=1)
    for predicted, share, count in bins:
        size = 3 + 6 * math.sqrt(count / max(1, largest))
        point = make_y_point(predicted, share)
        draw_error_bars(axes, [point], color=get_colour(0), marker="o", capsize=2, elinewidth=1, markersize=size)
        annotate_point(axes, Point(f"n={count}", point.x, share), INK, left=False, below=True)
    low = 0.5 if bins and min(predicted for predicted, _, _ in bins) >= 0.5 else 0.0
    lows = [share.low for _, share, _ in bins] + [share.mean for part in seed_bins.values() for _, share, _ in part]
    bottom = min([low, *filter(math.isfinite, lows)])
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(low - 0.01, 1.04), ylim=(bottom - 0.02, 1.04))
    values = "; ".join(f"{predicted:.2f}: {share.mean:.2f} of {count}" for predicted, share, count in bins)
    svg = render_svg(canvas, name, f"{title}: {y} by {x}. {values}")
    rows = [
        (keep_finite(predicted), count, *split_interval(share), part)
        for part, items in {"": bins, **seed_bins}.items()
        for predicted, share, count in items
    ]
    return Figure(name, svg, (x, "count", *split_heading(y), "of"), rows)


@rc_context(STYLE)
def plot_histogram(
    parts: Mapping[str, Sequence[float]], *, thresholds: Sequence[float], name: str, xlabel: str
) -> Figure:
    """A figure of a histogram, its parts stacked, with dashed lines at the thresholds.

    Two bins meet at the lowest threshold. Bins include their upper edge, as the hard part includes its threshold.
    """
    arrays = {part: np.asarray(values, np.float64) for part, values in parts.items()}
    thresholds = sorted(set(thresholds))
    edges = _compute_bin_edges(np.concatenate(list(arrays.values())), thresholds[0])
    last = len(edges) - 2
    counts = {
        part: np.bincount(np.clip(np.searchsorted(edges, values) - 1, 0, last), minlength=last + 1)
        for part, values in arrays.items()
    }
    label = f"threshold {thresholds[0]:.3g}"
    if len(thresholds) > 1:
        label = f"thresholds {thresholds[0]:.3g} to {thresholds[-1]:.3g}"
    canvas, axes = make_axes(4.8, 2.8)
    total = np.zeros(len(edges) - 1)
    for part, heights in counts.items():
        axes.bar(edges[:-1], heights, np.diff(edges), total, align="edge", alpha=0.85, label=part)
        total += heights
    for i, threshold in enumerate(thresholds):
        look = {"linewidth": 1.2 / len(thresholds) ** 0.5, "linestyle": "--"}
        axes.axvline(threshold, color=INK, label="" if i else label, **look)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=xlabel, ylabel="pairs")
    canvas.legend(loc="outside lower center", ncols=3)
    sums = ", ".join(f"{heights.sum()} {part}" for part, heights in counts.items())
    svg = render_svg(canvas, name, f"Histogram of {int(total.sum())} values of {xlabel}: {sums}; {label}")
    columns = [edges[:-1].tolist(), edges[1:].tolist(), *(heights.tolist() for heights in counts.values())]
    return Figure(name, svg, (f"{xlabel}, from", f"{xlabel}, to", *parts), list(zip(*columns, strict=True)))


def _compute_bin_edges(values: Float64[np.ndarray, " values"], threshold: float) -> Float64[np.ndarray, " edges"]:
    """Edges of about 40 bins over the range of the values, one of them at the threshold."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / HISTOGRAM_BINS
    steps = np.arange(math.floor((low - threshold) / width), math.ceil((high - threshold) / width) + 1)
    return np.unique(np.clip(threshold + width * steps, low, high))
