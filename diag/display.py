"""How numbers, verdicts and figures look, in a terminal, a notebook and the report alike.

Matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

LEVEL_MARKS = {
    "alarm": ("✖", "#b3261e", "alarm"),
    "warning": ("▲", "#9a5b00", "warning"),
    "unknown": ("?", "#5f5f8f", "unknown"),
    "ok": ("✔", "#1b6e3c", "ok"),
    "not_applicable": ("–", "#666666", "not applicable"),
}


def format_number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, as people write it: 1,797; 0.0312; 1.2e-07."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def format_share(value: float) -> str:
    """A share in [0, 1] as a percentage: 0.1234 is "12.3 %"."""
    return "undefined" if math.isnan(value) else f"{format_number(100 * value)} %"


def figure_svg(draw: Callable[[Any], None], *, size: tuple[float, float] = (5.2, 2.9), salt: str = "diag") -> str:
    """The inline SVG of what `draw(ax)` draws; the same drawing gives the same bytes.

    Lines and texts take the page's own colour where they are black, so one drawing serves a dark page and a
    light one.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Object-oriented figures and a local rc context leave the user's pyplot state alone.
    with matplotlib.rc_context(DRAWING_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embeddable(buffer.getvalue(), salt)


DRAWING_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "lines.linewidth": 1.6,
}


def _embeddable(svg: str, salt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"(?<=[\s:])(fill|stroke): ?#000000", r"\1: currentColor", svg)
    # Ids must not collide between the figures of one page.
    prefix = re.sub(r"[^A-Za-z0-9_-]", "_", salt)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}-\2"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


def verdict_html(level: str, sentence: str, advice: str = "", refutation: str = "", source: str = "") -> str:
    """A verdict as a fragment of HTML that carries its own style and no script."""
    mark, colour, word = LEVEL_MARKS[level]
    rows = [("What to try", advice), ("What would refute this", refutation), ("Source", source)]
    details = "".join(
        f"<div style='margin-top:.2em'><b>{name}:</b> {html.escape(text)}</div>" for name, text in rows if text
    )
    return (
        f"<div style='border-left:4px solid {colour};padding:.4em .8em;margin:.3em 0'>"
        f"<b style='color:{colour}'>{mark} {word}</b> {html.escape(sentence)}"
        f"<div style='font-size:.9em;opacity:.85'>{details}</div></div>"
    )


def table_html(rows: Mapping[str, tuple[str, str]], caption: str = "") -> str:
    """A table of name, value and description."""
    body = "".join(
        f"<tr><th scope='row' style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:right'>{html.escape(value)}</td>"
        f"<td style='text-align:left;opacity:.8'>{html.escape(description)}</td></tr>"
        for name, (value, description) in rows.items()
    )
    return f"<table><caption>{html.escape(caption)}</caption>{body}</table>"
