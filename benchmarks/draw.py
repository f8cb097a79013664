"""Figures of the growth of time and memory."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

KINDS = {"update": ("an update", "#2563eb"), "sampling": ("sampling", "#b45309")}


def draw_growth(results: dict[str, dict[str, list[dict[str, Any]]]], measure: str, label: str, path: Path) -> None:
    """Draw one log-log panel an axis; a dashed line extrapolates seconds from the first point by FLOPs.

    `results` holds points by axis and kind.
    """
    columns = 4
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(11, 2.7 * rows), sharey=True, squeeze=False)
    for panel, (axis, kinds) in zip(panels.flat, results.items(), strict=False):
        for kind, points in kinds.items():
            name, color = KINDS[kind]
            x, y = [point[axis] for point in points], [point[measure] for point in points]
            panel.plot(x, y, "o-", color=color, markersize=3, label=name)
            if measure == "seconds":
                mathematics = [y[0] * point["flops"] / points[0]["flops"] for point in points]
                panel.plot(x, mathematics, "--", color=color, linewidth=1, label=f"{name}: FLOPs")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(x, [f"{value:,}" for value in x], fontsize=7, rotation=30)
        panel.minorticks_off()
        panel.grid(color="#e5e7eb", linewidth=0.6)
    for panel in panels.flat[len(results) :]:
        panel.axis("off")
    for row in panels:
        row[0].set_ylabel(label)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
