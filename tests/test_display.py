"""Numbers as people write them, and drawings that are the same bytes each time."""

import math

import matplotlib
import pytest

from diag.display import figure_svg, format_number, format_share


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1797, "1,797"),
        (0.03125, "0.0312"),
        (1.2e-7, "1.20e-07"),
        (12345.6, "12,346"),
        (0.5, "0.5"),
        (-2.0, "-2"),
        (math.nan, "undefined"),
        (math.inf, "∞"),
        (9.9996, "10"),
        (True, "yes"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_shares():
    assert format_share(0.1234) == "12.3 %"
    assert format_share(math.nan) == "undefined"


def draw(ax):
    ax.plot([1, 2], [3, 4])
    ax.set(xlabel="x <b>", ylabel="y")


def test_a_drawing_is_repeatable_and_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    assert figure_svg(draw, salt="a") == figure_svg(draw, salt="a")
    assert dict(matplotlib.rcParams) == before


def test_two_drawings_on_a_page_share_no_id():
    import re

    ids = [set(re.findall(r'\bid="([^"]+)"', figure_svg(draw, salt=s))) for s in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_labels_are_escaped():
    assert "x &lt;b&gt;" in figure_svg(draw)
