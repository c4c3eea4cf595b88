"""How numbers, verdicts and figures look, in a terminal, a notebook and the report alike.

Matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# Mark, colour and word: no level is ever shown by its colour alone. The colours keep a contrast of at least
# 4.5 on white and 3.5 on near-black, because a fragment in a notebook does not know which it stands on.
LEVEL_MARKS = {
    "alarm": ("✖", "#d13b31", "alarm"),
    "warning": ("▲", "#a86200", "warning"),
    "unknown": ("?", "#6a6ab5", "unknown"),
    "ok": ("✔", "#1b8049", "ok"),
    "description": ("·", "#5b6b7a", "description"),
    "not_applicable": ("–", "#757575", "not applicable"),
}

# The series of every chart. A page may give each a tone of its own for light and for dark.
SERIES_COLOURS = ("#2f6db5", "#c65f12", "#2b8a57", "#7b56c2", "#b83b74", "#1f8a98")

# matplotlib's own, of the same hues in the same order: "tab:blue" and so on.
MATPLOTLIB_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#e377c2", "#17becf")

DRAWING_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "axes.unicode_minus": True,
    "figure.dpi": 72,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.edgecolor": "none",
    "legend.facecolor": "white",  # the page's ground; see _page_colour
    "legend.fancybox": False,
    "legend.framealpha": 0.75,
    "lines.linewidth": 1.6,
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "xtick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.labelsize": 8.5,
    "ytick.major.width": 0.7,
}

LARGE_SVG = 120_000
LARGEST_INPUT_SHOWN = 3 * 64 * 64  # numbers of an input that is kept so that a page can show it


def format_number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, as people write it.

    >>> format_number(1797), format_number(0.031234), format_number(1.2e-7), format_number(float("nan"))
    ('1,797', '0.0312', '1.20e-07', 'undefined')
    """
    if value is None or value != value:
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def format_share(value: float) -> str:
    """A share in [0, 1] as a percentage.

    >>> format_share(0.1234)
    '12.3 %'
    """
    return "undefined" if math.isnan(value) else f"{format_number(100 * value)} %"


def format_seconds(value: float) -> str:
    """A duration as people say it.

    >>> format_seconds(0.0032), format_seconds(48.1), format_seconds(725), format_seconds(12_000)
    ('3.2 ms', '48.1 s', '12 min 5 s', '3 h 20 min')
    """
    if value < 1:
        return f"{format_number(1000 * value)} ms"
    if value < 60:
        return f"{format_number(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def figure_svg(
    draw: Callable[[Any], None],
    *,
    size: tuple[float, float] = (5.2, 2.9),
    salt: str = "diag",
    label: str = "",
) -> str:
    """The inline SVG of what `draw(ax)` draws; the same drawing gives the same bytes.

    Black takes the page's own text colour, and series and level colours the page's tones where it has any, so
    that one drawing serves a dark page and a light one. A drawing of very many marks is rasterised, its text
    is not. `size` is in inches; `label` is read out by screen readers.
    """
    svg = _draw(draw, size, salt, rasterise=False)
    if len(svg) > LARGE_SVG:
        svg = _draw(draw, size, salt, rasterise=True)
    return _embeddable(svg, salt, label)


def _draw(draw: Callable[[Any], None], size: tuple[float, float], salt: str, rasterise: bool) -> str:
    import cycler
    import matplotlib
    from matplotlib.figure import Figure

    style = DRAWING_STYLE | {"svg.hashsalt": salt, "axes.prop_cycle": cycler.cycler(color=SERIES_COLOURS)}
    # Object-oriented figures and a local rc context leave the user's pyplot state alone.
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the measuring font lacks is drawn by the browser's
        figure = Figure(figsize=size)
        draw(figure.add_subplot())
        if rasterise:
            for artist in (a for ax in figure.axes for a in (*ax.lines, *ax.collections, *ax.patches)):
                artist.set_rasterized(True)
        tight = "tight" if len(figure.axes) > 1 else None
        if tight is None:
            _fit(figure)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches=tight, dpi=110, metadata=metadata)
        about = _readable(figure.axes[0], size) if tight is None else ""
    return buffer.getvalue().replace("<svg ", f"<svg {about}", 1)


def _readable(ax: Any, size: tuple[float, float]) -> str:
    """What a script needs to read values off the drawing: where the axes stand, their ends, scales and labels."""
    at, (width, height) = ax.get_position(), (72 * size[0], 72 * size[1])
    box = [width * at.x0, height * (1 - at.y1), width * at.x1, height * (1 - at.y0)]
    ends = {
        name: [float(f"{end:.6g}") for end in limits] + [scale if _has_numbers(axis) else "names"]
        for name, limits, scale, axis in (
            ("x", ax.get_xlim(), ax.get_xscale(), ax.xaxis),
            ("y", ax.get_ylim(), ax.get_yscale(), ax.yaxis),
        )
    }
    labels = [ax.get_xlabel(), ax.get_ylabel()]
    about = json.dumps({"box": [round(b, 1) for b in box], **ends, "labels": labels})
    return f'data-plot="{html.escape(about)}" '


def _has_numbers(axis: Any) -> bool:
    """Whether the axis measures: not where its ticks are names or have been given by hand."""
    return type(axis.get_major_formatter()).__name__ not in ("FixedFormatter", "StrCategoryFormatter")


def _fit(figure: Any) -> None:
    """Let the only Axes fill the figure, its labels included: constrained layout at half its cost."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    ax, pad = figure.axes[0], 0.012
    for _ in range(1 if ax.get_aspect() == "auto" else 2):
        box = ax.get_tightbbox(figure._get_renderer())
        if box is None:
            return
        box, at = box.transformed(figure.transFigure.inverted()), ax.get_position()
        left, bottom = at.x0 - box.x0 + pad, at.y0 - box.y0 + pad
        right, top = box.x1 - at.x1 + pad, box.y1 - at.y1 + pad
        ax.set_position([left, bottom, max(0.1, 1 - left - right), max(0.1, 1 - bottom - top)])


def _embeddable(svg: str, salt: str, label: str = "") -> str:
    """Make matplotlib's document a fragment: small, without global style, with unique ids and the page's
    colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    referenced = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    prefix = re.sub(r"[^A-Za-z0-9_-]", "_", salt)
    # Only what stands inside tags is rewritten: a label's text may look like markup or like a colour.
    parts = re.split(r"(<[^>]+>)", svg)
    tags = [_clean_tag(p, prefix, referenced) if p.startswith("<") else (p if p.strip() else "") for p in parts]
    head = next(i for i, part in enumerate(tags) if part.startswith("<svg"))
    tags[head] = _svg_tag(tags[head], label)
    return "".join(tags)


def _svg_tag(tag: str, label: str) -> str:
    box = re.search(r'viewBox="([^"]+)"', tag)
    view = box.group(1) if box else "0 0 1 1"
    width = float(view.split()[2])
    readable = re.search(r'data-plot="[^"]*"', tag)
    read = f" {readable[0]}" if readable else ""
    named = f' role="img" aria-label="{html.escape(label)}"' if label else ""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}" fill="currentColor" stroke-linejoin="round" stroke-linecap="butt"{named}{read} '
        f'style="width:100%;max-width:{width * 4 / 3:.0f}px;height:auto">'
    )


def _clean_tag(tag: str, prefix: str, referenced: set[str]) -> str:
    def own_id(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in referenced else ""

    if tag.startswith("<image"):  # its data must stay as they are
        return re.sub(r'\sid="[^"]+"', "", tag)
    tag = re.sub(r'\s+id="([^"]+)"', own_id, tag)
    tag = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", tag)
    tag = re.sub(r"font-family: [^;\"]+;? ?|stroke-linecap: square;? ?|; (?=\")", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)
    tag = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: {_page_colour(m[2])}", tag)
    tag = re.sub(r"(-?\d+\.\d\d)\d+", r"\1", tag)
    return re.sub(r"\s+", " ", tag)


def _page_colour(colour: str) -> str:
    """A colour as CSS: black, white, series and levels take the surrounding page's own, where it sets them."""
    if colour == "#000000":
        return "currentColor"
    if colour == "#ffffff":
        return "var(--diag-surface, var(--jp-layout-color0, var(--vscode-editor-background, #ffffff)))"
    series = (*SERIES_COLOURS, *MATPLOTLIB_COLOURS)
    if colour in series:
        return f"var(--diag-series-{series.index(colour) % len(SERIES_COLOURS)}, {colour})"
    for level, (_, tone, _) in LEVEL_MARKS.items():
        if colour == tone:
            return f"var(--diag-{level.replace('_', '-')}, {colour})"
    return colour


def verdict_html(level: str, sentence: str, advice: str = "", refutation: str = "", source: str = "") -> str:
    """A verdict as a fragment of HTML that carries its own style and no script."""
    mark, colour, word = LEVEL_MARKS[level]
    rows = [("What to try", advice), ("What would refute this", refutation), ("Source", source)]
    details = "".join(
        f"<div style='margin-top:.35em'><span style='opacity:.7'>{name}</span><br>{html.escape(text)}</div>"
        for name, text in rows
        if text
    )
    return (
        f"<div style='border-left:3px solid {colour};padding:.35em 0 .35em .9em;margin:.5em 0;max-width:46em;"
        f"line-height:1.45'><div><b style='color:{colour}'><span aria-hidden='true'>{mark}</span> {word}</b> "
        f"&nbsp;{html.escape(sentence)}</div><div style='font-size:.92em'>{details}</div></div>"
    )


def table_html(rows: Mapping[str, tuple[str, str]], caption: str = "") -> str:
    """A table of name, value and description."""
    pad = "vertical-align:top;padding:.15em 1em .15em 0"
    left, right = f"text-align:left;{pad}", f"text-align:right;{pad}"
    body = "".join(
        f"<tr><th scope='row' style='{left};font-weight:500'>{html.escape(name)}</th>"
        f"<td style='{right};font-variant-numeric:tabular-nums;white-space:nowrap'>{html.escape(value)}</td>"
        f"<td style='{left};opacity:.75'>{html.escape(description)}</td></tr>"
        for name, (value, description) in rows.items()
    )
    title = f"<caption style='text-align:left;opacity:.75'>{html.escape(caption)}</caption>" if caption else ""
    return f"<table style='border-collapse:collapse;margin:.5em 0'>{title}<tbody>{body}</tbody></table>"


def displayed(value: Any, describe: Callable[[Any], str] | None = None) -> dict[str, Any]:
    """One input, a NumPy array, as text, image or features: what a report shows of an example."""
    if describe is not None:
        return {"text": describe(value)}
    if value.dtype.kind in "iub":
        return {"text": " ".join(map(str, value.ravel()[:64].tolist()))}
    return {"image": value} if value.ndim in (2, 3) else {"features": value.ravel()}
