"""Figures as SVG text for an HTML page, each with the numbers that it draws."""

from mixpo.report.figures.bins import plot_calibration, plot_histogram, plot_shares_by_bin
from mixpo.report.figures.curves import MAX_POINTS, make_colour_key, plot_curves
from mixpo.report.figures.data import Bin, BinShare, Point, exact_interval
from mixpo.report.figures.intervals import plot_forest, plot_grouped_intervals
from mixpo.report.figures.paths import plot_paths, plot_scatter
from mixpo.report.figures.plane import plot_points

__all__ = [
    "MAX_POINTS",
    "Bin",
    "BinShare",
    "Point",
    "exact_interval",
    "make_colour_key",
    "plot_calibration",
    "plot_curves",
    "plot_forest",
    "plot_grouped_intervals",
    "plot_histogram",
    "plot_paths",
    "plot_points",
    "plot_scatter",
    "plot_shares_by_bin",
]
