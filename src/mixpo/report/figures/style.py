"""Colours, markers, dashes and text sizes of every figure."""

from textwrap import wrap
from typing import Any

COLOURS = ("#2f7ed8", "#d9622b", "#2a9d6e", "#b8479a", "#8468d8", "#9a7b16", "#1f97a8", "#cf4453")
"""Readable on white and on near-black."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Placeholder for the page's text colour, light or dark."""
MAX_LABEL = 40
"""Characters of a label in a figure; its data and its description keep the whole label."""
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


def get_colour(index: int) -> str:
    """Hex colour of the arm or curve with this index; the eight colours repeat."""
    return COLOURS[index % len(COLOURS)]


def get_marker(index: int) -> str:
    """Matplotlib marker of the arm with this index, different from those of arms of the same colour."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def get_dashes(index: int) -> tuple[float, ...]:
    """Lengths of a line's dashes and gaps, which tell lines of the same colour apart; empty for a solid line."""
    return ((), (4.0, 1.5), (1.0, 1.5))[index // len(COLOURS) % 3]


def shorten_label(label: str) -> str:
    """A label on one line, cut to 40 characters with `…`."""
    line = " ".join(label.split())
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


def wrap_label(label: str) -> str:
    """A label cut to 40 characters, in lines of about 18."""
    return "\n".join(wrap(shorten_label(label), 18, break_long_words=False, break_on_hyphens=False))
