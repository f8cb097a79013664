"""A matplotlib figure as an SVG element that stands inside an HTML page."""

import io
import re
import warnings
from html import escape
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context

from mixpo.report.figures.style import INK, STYLE


def render_svg(canvas: Any, id_salt: str, alt_text: str) -> Markup:
    """A matplotlib figure as an inline `svg` element that scales with the page and takes its text colour."""
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": id_salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's fonts draw the text
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    width = float(view[1].split()[2]) * 1.6
    label = escape(alt_text.replace("-0.00", "0.00"), quote=True)
    head = f'<svg {namespaces} viewBox="{view[1]}" style="max-width: {width:.0f}px" role="img" aria-label="{label}">'
    return Markup(head + body.strip())
