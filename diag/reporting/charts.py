"""The charts of a result, drawn by the result itself; one that cannot be drawn says why instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from diag.display import figure_svg
from diag.reporting.plain import clean
from diag.result import Result
from diag.run.entries import Finding

SERIES_POINTS = 120
MAX_SVG = 160_000
SIZE = (4.4, 2.55)

Chart = dict[str, Any]


def tells_by_a_chart(finding: Finding) -> bool:
    """Whether a chart of a check that found nothing wrong shows more than its sentence: not where it would be the
    number of steps that were looked at, or one value throughout."""
    return not _only_counts_steps(finding.series[-1][1]) and (len(finding.series) == 1 or _has_a_course(finding))


def _has_a_course(finding: Finding) -> bool:
    """Whether measurements over the steps show something: more than one value, and that no number of a step."""
    last = finding.series[-1][1]
    if type(last).plot_trend.__func__ is not Result.plot_trend.__func__:  # type: ignore[attr-defined]
        return len(finding.series) > 1
    first = next(iter(last.scalars()), "")
    values = {result.scalars().get(first) for _, result in finding.series}
    return len(values) > 1 and not first.endswith("_step")


def _only_counts_steps(result: Result) -> bool:
    return next(iter(result.scalars()), "").startswith("num_")


def charts(finding: Finding, salt: str, at_most: int) -> tuple[list[Chart], dict[str, str]]:
    """The charts of a finding (name, caption, problem) and their drawings by name.

    The course over the steps comes first, where there is one, then the last measurement.
    """
    last_step, last = finding.series[-1]
    if _only_counts_steps(last):  # the sentence has all that a drawing would show
        return [], {}
    to_draw: list[tuple[str, str, Callable[[Any], None]]] = []
    if _has_a_course(finding):
        series = thinned(finding.series)
        about = f"{finding.title} over the training steps"
        to_draw.append(("course", about, lambda ax: type(last).plot_trend(ax, series)))
    when = f", at step {last_step:,}" if finding.last_step > 0 else ""
    to_draw.append(("last", f"{finding.title}{when}", last.plot))
    made, drawings = [], {}
    for name, caption, draw in to_draw[:at_most]:
        key = f"{finding.instrument}-{name}"
        svg, problem = _try(draw, f"{salt}-{key}", clean(caption))
        made.append({"key": key, "caption": clean(caption), "problem": problem})
        if svg:
            drawings[key] = svg
    return made, drawings


def _try(draw: Callable[[Any], None], salt: str, label: str) -> tuple[str, str]:
    """(SVG, "") or ("", why there is none)."""
    try:
        svg = clean(figure_svg(draw, size=SIZE, salt=salt, label=label))
    except NotImplementedError:
        return "", "This result draws no chart."
    except Exception as error:
        return "", clean(f"No chart: drawing it raised {type(error).__name__}: {error}")
    if len(svg) > MAX_SVG:
        return "", f"No chart: the drawing has {len(svg) // 1000:,} kB, more than a page can carry."
    return svg, ""


def thinned(series: Sequence[tuple[int, Result]], at_most: int = SERIES_POINTS) -> list[tuple[int, Result]]:
    """At most `at_most` points of a long series: the first, the last, and of each part in between the ones
    where the first scalar is least and greatest."""
    if len(series) <= at_most:
        return list(series)
    name = next(iter(series[-1][1].scalars()), None)
    values = [result.scalars().get(name, 0.0) if name else 0.0 for _, result in series]
    parts = at_most // 2 - 1
    edges = [1 + i * (len(series) - 2) // parts for i in range(parts + 1)]
    kept = {0, len(series) - 1}
    for a, b in itertools.pairwise(edges):
        kept |= {min(range(a, b), key=values.__getitem__), max(range(a, b), key=values.__getitem__)}
    return [series[i] for i in sorted(kept)]
