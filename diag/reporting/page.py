"""The page of a report: a pure rendering of its document, in one file that needs no network.

The same document gives the same bytes. Every text is escaped by the templates; drawings are the SVG that
`diag.display.figure_svg` made of them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy
from markupsafe import Markup, escape

from diag.display import LEVEL_MARKS, format_number
from diag.reporting.examples import png_uri
from diag.reporting.words import PATTERN, WORDS, word_id, words_in

MARKS = {level: mark for level, (mark, _, _) in LEVEL_MARKS.items()} | {"skipped": "»", "failed": "!"}
LEVEL_WORDS = {level: word for level, (_, _, word) in LEVEL_MARKS.items()} | {
    "skipped": "skipped",
    "failed": "failed",
}
WITHOUT_VERDICT = ("skipped", "failed")  # levels whose cards have the reason and nothing else
FOLDED = (
    ("unknown", "Could not tell", "The uncertainty of the measurement straddles the threshold."),
    ("ok", "Passed", "The check could judge, and its number is on the good side of its threshold."),
    (
        "description",
        "Descriptions",
        "Measured; no paper or calibration licenses a judgement, so it is neither good nor bad.",
    ),
    ("not_applicable", "Do not apply", "A precondition of the check does not hold, so it gives no verdict."),
    ("skipped", "Skipped", "Something was missing, so nothing was measured."),
    ("failed", "Failed", "The check ended in an error, so there is no verdict."),
)

# Viridis at nine equal steps (Smith and van der Walt, 2015; public domain): even in lightness, so that it also
# reads in grey and to the colour-blind.
VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
UNOBSERVED, NOT_FINITE, COLOURS = 0, 1, 254  # palette: unobserved, not finite, then the scale


def render(document: Mapping[str, Any]) -> str:
    """The page of `document` (see `diag.reporting.document`) as HTML."""
    return _template(TEMPLATES.get(document["format"], "page.html")).render(doc=document, glossary=True)


def render_notebook(document: Mapping[str, Any], path: str = "") -> str:
    """A fragment for a notebook cell: the verdict and the cards, with scoped style and no script."""
    name = "notebook.html" if document["format"] == "diag-report" else "compare_notebook.html"
    return _template(name).render(doc=document, path=path)


TEMPLATES = {"diag-comparison": "compare.html", "diag-gallery": "gallery.html"}


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "embed": embed,
        "linked": linked,
        "explained": with_meanings,
        "height": height,
        "num": lambda value: "–" if value is None else format_number(value),
        "percent": lambda share: f"{100 * share:.2f}%",
        "line": line_path,
        "band": band_path,
        "heat": heat_image,
        "power": lambda exponent: format_number(10.0**exponent),
        "every": every,
    }
    environment.globals |= {"MARKS": MARKS, "WORDS": LEVEL_WORDS, "FOLDED": FOLDED, "include": _raw}
    environment.globals["WITHOUT_VERDICT"] = WITHOUT_VERDICT
    environment.globals["gradient"] = ", ".join(f"#{colour}" for colour in VIRIDIS)
    return environment


def _raw(name: str) -> Markup:
    """A style sheet or script of the package, as it is."""
    loader = _environment().loader
    assert loader is not None
    return Markup(loader.get_source(_environment(), name)[0])


def embed(document: Mapping[str, Any]) -> Markup:
    """The document as JSON that cannot end a script element, without what the page's cards have as it is: the
    drawings, and the texts about the checks, in whose place stands where they are (the script puts them back where
    the data are downloaded)."""
    data = {key: value for key, value in document.items() if key != "drawings"}
    if "audits" in data:
        data["audits"] = [audit | _where_it_is_described(audit) for audit in data["audits"]]
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _where_it_is_described(audit: Mapping[str, Any]) -> dict[str, str]:
    on_card = audit["documentation"] and audit["level"] not in WITHOUT_VERDICT
    return {"documentation": f"#check-{audit['id']}"} if on_card else {}


LINK = r"arXiv:\s?(\d{4}\.\d{4,5}(?:v\d+)?)|(https?://[^\s<>\"']+[^\s<>\"'.,;)])"

EXPLAINED = re.compile(f"{LINK}|{PATTERN.pattern}", re.IGNORECASE)


def linked(text: str) -> Markup:
    """A text in which arXiv identifiers and web addresses are links."""
    return _marked(text, re.compile(LINK), _link_of)


def _link_of(match: re.Match[str]) -> Markup:
    address = f"https://arxiv.org/abs/{match[1]}" if match[1] else match[2]
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(address, match[0])


def _marked(text: str, pattern: re.Pattern[str], mark: Callable[[re.Match[str]], Markup]) -> Markup:
    """A text, escaped, with what matches as markup."""
    parts, end = [], 0
    for match in pattern.finditer(text):
        parts += [escape(text[end : match.start()]), mark(match)]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


@jinja2.pass_context
def with_meanings(context: jinja2.runtime.Context, text: str) -> Markup:
    """A text with its links, in which a word that the page explains leads there where it first stands."""
    known = {row["word"] for row in context["doc"].get("words", ())} if context.get("glossary") else set()
    seen: set[str] = set()

    def mark(match: re.Match[str]) -> Markup:
        if match[1] or match[2]:
            return _link_of(match)
        (word,) = words_in(match[0])
        if word not in known or word in seen:
            return escape(match[0])
        seen.add(word)
        link = Markup('<a class="term" href="#word-{}" title="{}">{}</a>')
        return link.format(word_id(word), WORDS[word], match[0])

    return _marked(text, EXPLAINED, mark)


def every(count: int, at_most: int) -> int:
    """The stride that shows at most `at_most` of `count` labels."""
    return max(1, -(-count // at_most))


# Curves. The drawing is 1000 wide and 100 high and is stretched to its place on the page.


def line_path(curve: Mapping[str, Any]) -> str:
    """The middle values of a curve as an SVG path; a gap wherever there is none."""
    return "".join(_polyline(run) for run in _runs(curve, "middle"))


def band_path(curve: Mapping[str, Any]) -> str:
    """The area between the least and the greatest values of a curve."""
    if "low" not in curve:
        return ""
    lows, highs = _runs(curve, "low"), _runs(curve, "high")
    return "".join(
        f"{_polyline(high)}L{' '.join(f'{x:g},{y:g}' for x, y in reversed(low))}Z"
        for low, high in zip(lows, highs, strict=True)
    )


def _runs(curve: Mapping[str, Any], name: str) -> list[list[tuple[float, float]]]:
    """The points of a curve, split where a value is missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in zip(curve["at"], curve[name], strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((round(1000 * at, 1), round(100 * (1 - height(curve, value)), 2)))
    return [run for run in runs if run]


def height(curve: Mapping[str, Any], value: float) -> float:
    """How high in its panel a value stands, in [0, 1]."""
    if curve["log"]:
        value = math.log10(value) if value > 0 else -math.inf
    share = (value - curve["low_end"]) / (curve["high_end"] - curve["low_end"])
    return min(1.0, max(0.0, share))


def _polyline(run: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = run
    # A single point becomes a short stroke, or it would not be seen.
    return f"M{x:g},{y:g}" + (f"L{' '.join(f'{x:g},{y:g}' for x, y in rest)}" if rest else "h1")


# The map of layer by step.


def heat_image(heat: Mapping[str, Any]) -> str:
    """A map as the data URI of a PNG, one pixel a cell."""
    values = numpy.array(heat["values"], dtype=float)
    with numpy.errstate(divide="ignore"):
        share = (numpy.log10(values) - heat["low"]) / (heat["high"] - heat["low"])
    scaled = 2 + numpy.nan_to_num(share.clip(0, 1) * (COLOURS - 1), nan=0.0)
    pixels = numpy.where(numpy.isnan(values), UNOBSERVED, scaled.round()).astype(numpy.uint8)
    for layer, column in heat["nonfinite"]:
        pixels[layer, column] = NOT_FINITE
    return png_uri(pixels, [(0, 0, 0, 0), (224, 36, 36, 255), *_palette()])


def _palette() -> Iterable[tuple[int, int, int, int]]:
    stops = numpy.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in VIRIDIS], float)
    at = numpy.linspace(0, len(stops) - 1, COLOURS)
    for position in at:
        red, green, blue = (round(float(numpy.interp(position, range(len(stops)), stops[:, c]))) for c in range(3))
        yield red, green, blue, 255
