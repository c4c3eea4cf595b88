"""Charts of results, and what is said where there is none."""

import dataclasses
import importlib
import re

import matplotlib.pyplot as plt
import numpy
import pytest
import report_fakes
from report_fakes import HOSTILE, Bare, Collapse, finding, series

from diag.display import LEVEL_MARKS, figure_svg
from diag.reporting import document
from diag.reporting.charts import charts, thinned
from diag.result import Result, Verdict, measured


def scalar_series(values):
    return series(Bare, list(range(1, len(values) + 1)), ratio=lambda t: values[round(t * (len(values) - 1))])


def test_a_course_and_a_last_measurement():
    finding = report_fakes.evidence().findings[0]
    made, drawn = charts(finding, "s", 2)
    assert [c["key"] for c in made] == ["collapse-course", "collapse-last"]
    assert made[1]["caption"] == "Softmax collapse, at step 900"
    assert all(drawn[c["key"]].startswith("<svg") and not c["problem"] for c in made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Result):
    num_steps: int = measured("steps looked at")

    def verdict(self):
        return Verdict("alarm", "Something was found in the loop.")


def test_a_count_of_steps_is_not_drawn():
    found = finding("counted", "Counted", series(Counted, [1, 2], num_steps=3))
    assert charts(found, "salt", 2) == ([], {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dated(Result):
    lost_step: int = measured("the first of the steps at which something was lost; 0 for none")

    def verdict(self):
        return Verdict("alarm", "Something was lost.")

    def plot(self, ax):
        ax.plot([0, 1], [0, self.lost_step])


def test_neither_the_number_of_a_step_nor_one_value_throughout_is_a_course():
    dated = finding("dated", "Dated", [(step, Dated(lost_step=min(step, 3))) for step in (1, 3, 60)])
    assert [c["key"] for c in charts(dated, "s", 2)[0]] == ["dated-last"]
    level = finding("bare", "Bare", series(Bare, [1, 2, 3], ratio=2.0))
    assert [c["key"] for c in charts(level, "s", 2)[0]] == ["bare-last"]


@pytest.mark.parametrize(
    ("result", "label"), [(Counted(num_steps=3), "steps looked at"), (Dated(lost_step=3), "lost step")]
)
def test_the_axis_of_a_course_says_what_is_measured_where_that_is_short(result, label):
    _, ax = plt.subplots()
    type(result).plot_trend(ax, [(1, result), (2, result)])
    assert ax.get_ylabel() == label
    plt.close()


def test_one_measurement_has_no_course():
    finding = report_fakes.evidence().findings[1]
    assert [c["key"] for c in charts(finding, "s", 2)[0]] == ["opposing-last"]


def test_a_plot_that_raises_gives_its_reason():
    finding = report_fakes.finding("bare", "Bare", scalar_series([1.0])[:1])
    (chart,), drawn = charts(finding, "s", 1)
    assert drawn == {} and chart["problem"] == f"No chart: drawing it raised ValueError: cannot draw {HOSTILE}"


def test_a_result_without_plot_says_so():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(Bare):
        plot = Result.plot

    finding = report_fakes.finding("bare", "Bare", series(Silent, [1], ratio=1.0))
    assert charts(finding, "s", 1)[0][0]["problem"] == "This result draws no chart."


def test_a_drawing_of_very_many_marks_becomes_a_picture_with_text():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cloud(Bare):
        def plot(self, ax):
            points = numpy.random.default_rng(0).random((2, 20_000))
            ax.scatter(*points)
            ax.set(xlabel="left or right", ylabel="up or down")

    finding = report_fakes.finding("bare", "Bare", series(Cloud, [1], ratio=1.0))
    _, drawn = charts(finding, "s", 1)
    svg = drawn["bare-last"]
    assert len(svg) < 160_000 and "data:image/png" in svg and "left or right" in svg


@pytest.mark.parametrize("count", [1, 119, 120, 121, 1000])
def test_a_long_series_keeps_its_ends_and_extremes(count):
    values = numpy.random.default_rng(count).random(count)
    rows = scalar_series(list(values))
    kept = thinned(rows)
    assert len(kept) <= 120 and kept[0] == rows[0] and kept[-1] == rows[-1]
    ratios = [r.ratio for _, r in kept]
    assert min(ratios) == values.min() and max(ratios) == values.max()
    assert [s for s, _ in kept] == sorted({s for s, _ in kept})


def test_charts_beyond_the_room_of_a_page_are_left_out_the_worst_kept(monkeypatch):
    module = importlib.import_module("diag.reporting.document")
    evidence = report_fakes.evidence()
    first = len(document(evidence)["drawings"]["collapse-course"])
    monkeypatch.setattr(module, "ROOM_FOR_DRAWINGS", first)
    made = document(evidence)
    assert list(made["drawings"]) == ["collapse-course"]
    assert made["audits"][1]["charts"][0]["problem"] == "No chart: the page has no room left for it."


# What figure_svg promises to every page.


def test_text_that_looks_like_markup_stays_text():
    texts = (HOSTILE, 'id="a" stroke: #000000 url(#x)', "]]>&amp;")
    svg = figure_svg(lambda ax: ax.set(xlabel=texts[0], ylabel=texts[1], title=texts[2]), label=HOSTILE)
    assert "<script" not in svg
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in svg
    assert 'id="a" stroke: #000000 url(#x)' in svg
    assert 'aria-label="&lt;script&gt;' in svg


def test_a_figure_takes_the_colours_of_the_page_and_leaks_no_style():
    def draw(ax):
        ax.plot([1, 2], [1, 2])
        ax.axhline(1.5, color=LEVEL_MARKS["alarm"][1])
        ax.plot([1, 2], [2, 1], color="white")

    svg = figure_svg(draw)
    assert "<style" not in svg and "#000000" not in svg and "DejaVu" not in svg
    for variable in ("--diag-series-0", "--diag-alarm", "--diag-surface", "currentColor"):
        assert variable in svg


def test_figures_of_one_page_share_no_ids():
    def ids(salt):
        return set(re.findall(r'\sid="([^"]+)"', figure_svg(lambda ax: ax.plot([1, 2], marker="o"), salt=salt)))

    assert ids("a") and not ids("a") & ids("b")


def test_every_reference_in_a_figure_has_its_target():
    svg = figure_svg(Collapse(collapsed=0.1, headroom=1.0, margins=numpy.arange(9.0)).plot, salt="x y<z")
    targets = set(re.findall(r'\sid="([^"]+)"', svg))
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    assert used and used <= targets


def test_labels_lie_within_the_figure():
    svg = figure_svg(lambda ax: ax.set(xlabel="x" * 10, ylabel="a rather long label of an axis", ylim=(0, 1e-7)))
    width, height = (float(v) for v in svg.split('viewBox="0 0 ')[1].split('"')[0].split())
    for x, y in re.findall(r'<text [^>]*\bx="([\d.-]+)" y="([\d.-]+)"', svg):
        assert 0 <= float(x) <= width and 0 <= float(y) <= height
