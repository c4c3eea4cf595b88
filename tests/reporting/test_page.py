"""The page as text: escaped, self-contained, the same bytes each time."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy
import pytest
import report_fakes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fakes import HOSTILE

import diag
from diag.errors import InvalidInput
from diag.reporting import Page, document, render
from diag.reporting.page import band_path, heat_image, line_path, linked
from diag.reporting.plain import clean


def test_the_same_document_gives_the_same_bytes(made, html):
    assert render(json.loads(json.dumps(made))) == html


def test_a_fresh_process_gives_the_same_bytes(html, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(report_fakes.__file__).rsplit('/', 1)[0]!r})\n"
        "import report_fakes, diag\n"
        f"diag.report(report_fakes.evidence(), {str(tmp_path / 'again.html')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7"})
    assert (tmp_path / "again.html").read_text() == html


def test_every_text_of_the_model_is_escaped(html):
    assert "<script>alert" not in html
    assert html.count("<script") == 2  # the data and our own
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


class Texts(HTMLParser):
    """The texts and the elements of a page."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@settings(deadline=None, max_examples=15)
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=40).filter(str.strip))
def test_any_text_of_a_model_stays_text(text):
    evidence = report_fakes.evidence()
    worst = evidence.findings[0]
    verdict = dataclasses.replace(worst.verdict, sentence=text, advice=text, layers=(text,), source=text)
    history = dataclasses.replace(evidence.history, layers=(text, *evidence.history.layers[1:]), notes=(text,))
    findings = [dataclasses.replace(worst, verdict=verdict, title=text), *evidence.findings[1:]]
    changed = dataclasses.replace(evidence, findings=findings, history=history, title=text)
    html = render(document(changed, drawings=False))
    html.encode("utf-8")
    page = Texts(html)
    assert page.tags.count("script") == 2
    # A reader sees the text as it was, but for what no page can hold.
    seen = clean(text).replace("\r", "\n")
    assert any(seen in data.replace("\r", "\n") for data in page.texts)


@pytest.mark.parametrize(
    ("label", "shown"),
    [("层 <b>", "层 &lt;b&gt;"), ("a\x01b", "a\N{REPLACEMENT CHARACTER}b"), ("\ud800", "No chart")],
)
def test_a_drawing_with_any_text_can_be_written(label, shown, tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(report_fakes.Bare):
        def plot(self, ax):
            ax.set_xlabel(label)

    assert shown in diag.report({"odd": Odd(ratio=1.0)}, tmp_path / "odd.html").html


def test_the_document_is_embedded_and_cannot_end_its_element(made, html):
    text = re.search(r'<script type="application/json" id="diag-document">(.*?)</script>', html, re.S)[1]
    assert "<" not in text and "&" not in text
    embedded = json.loads(text)
    assert embedded == {k: v for k, v in made.items() if k != "drawings"}
    assert any(row["name"] == HOSTILE for row in embedded["layers"]["rows"])


def test_what_a_check_is_stands_on_its_card_once_and_in_the_document_beside_the_page(tmp_path):
    result = diag.softmax_collapse(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0]))
    page = diag.report({"softmax_collapse": result}, tmp_path / "page.html")
    (text,) = (audit["documentation"] for audit in page.document["audits"])
    assert len(text) > 100 and "".join(Texts(page.html).texts).count(text) == 1
    embedded = json.loads(re.search(r'id="diag-document">(.*?)</script>', page.html, re.S)[1])
    (audit,) = embedded["audits"]
    assert audit["documentation"] == f"#check-{audit['id']}" and f'id="check-{audit["id"]}"' in page.html
    assert json.loads((tmp_path / "page.json").read_text())["audits"] == page.document["audits"]


def test_nothing_is_loaded_from_elsewhere(html):
    loading = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', re.sub(r"<a [^>]*>", "", html))
    assert loading and all(address.startswith(("data:", "#")) for address in loading)
    assert "@import" not in html and not re.findall(r"url\((?!#)", html)


def test_ids_are_unique_and_every_link_within_the_page_has_its_target(html):
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert targets and targets <= set(ids)
    for section in ("verdict", "caveats", "findings", "timeline", "layers", "checks", "method", "data"):
        assert section in ids


def test_the_page_is_small(html):
    assert len(html.encode()) < 400_000


def test_a_hundred_thousand_steps_of_two_hundred_layers_stay_under_a_megabyte():
    names = {f"transformer.h.{i}.mlp.c_proj.weight": 1000 + i for i in range(200)}
    history = report_fakes.history(2000, names)
    # The size of the page depends on the number of steps only below 480: the slow test has the full length.
    made = document(report_fakes.evidence(history=history, last_step=2000))
    assert len(render(made).encode()) < 900_000


@pytest.mark.slow
def test_a_long_run_of_many_layers_at_full_length():
    names = {f"transformer.h.{i}.mlp.c_proj.weight": 1000 + i for i in range(200)}
    made = document(report_fakes.evidence(history=report_fakes.history(100_000, names), last_step=100_000))
    assert len(render(made).encode()) < 1_000_000


def test_tables_have_captions_and_scopes_and_figures_have_names(html):
    assert html.count("<table") == html.count("<caption")
    assert not re.findall(r"<th(?![^>]*scope=)[ >]", html)
    assert not re.findall(r"<img(?![^>]*alt=)", html)
    assert all('aria-label="' in svg for svg in re.findall(r"<svg[^>]*role=[^>]*>", html))


def test_papers_and_addresses_become_links():
    text = linked("Prieto 2025, arXiv:2501.04697v2; see https://example.org/a.html. <b>")
    assert '<a href="https://arxiv.org/abs/2501.04697v2" rel="noreferrer">arXiv:2501.04697v2</a>' in text
    assert '<a href="https://example.org/a.html" rel="noreferrer">https://example.org/a.html</a>. &lt;b&gt;' in text
    assert "<a" not in linked("javascript:alert(1) arXiv:25")


def test_a_curve_breaks_where_nothing_was_observed():
    curve = {
        "at": [0.0, 0.5, 0.75, 1.0],
        "middle": [0.0, None, 1.0, 0.5],
        "log": False,
        "low_end": 0.0,
        "high_end": 1.0,
    }
    assert line_path(curve) == "M0,100h1M750,0L1000,50"
    assert band_path(curve) == ""
    band = curve | {"low": [0.0, None, 0.5, 0.0], "high": [1.0, None, 1.0, 1.0]}
    assert band_path(band) == "M0,0h1L0,100ZM750,0L1000,0L1000,100 750,50Z"


def test_a_map_has_a_pixel_a_cell():
    from test_examples import pixels

    heat = {"values": [[1.0, 100.0], [None, 10.0], [0.0, 1e9]], "low": 0.0, "high": 2.0, "nonfinite": [[1, 1]]}
    got = (255 * pixels(heat_image(heat))).round().astype(int)
    assert got.shape == (3, 2, 4)
    assert got[0, 0].tolist() == [0x44, 0x01, 0x54, 255] and got[0, 1].tolist() == [0xFD, 0xE7, 0x25, 255]
    assert got[1, 0, 3] == 0  # not observed: nothing
    assert got[1, 1].tolist() == [224, 36, 36, 255]
    # Beyond the ends of the scale the colours stay those of the ends.
    numpy.testing.assert_array_equal(got[2], [got[0, 0], got[0, 1]])


# The object.


def test_writing_a_report(evidence, made, html, tmp_path):
    page = diag.report(evidence, tmp_path / "deep" / "mine.html")
    assert page.path == tmp_path / "deep" / "mine.html"
    assert page.path.read_text() == page.html == html
    assert json.loads((tmp_path / "deep" / "mine.json").read_text()) == made
    assert sorted(p.name for p in page.path.parent.iterdir()) == ["mine.html", "mine.json"]
    assert diag.report(evidence, tmp_path).path == tmp_path / "report.html"
    assert "One alarm and one warning" in repr(page)


def test_a_report_that_is_not_written(made):
    page = Page(made)
    assert page.path is None
    with pytest.raises(InvalidInput, match=r"was not written to a file; give output=, or call \.save"):
        os.fspath(page)


def test_an_output_that_is_no_page(made, tmp_path):
    with pytest.raises(InvalidInput, match=r"output is '.*report\.pdf'; expected a name that ends in \.html"):
        Page(made).save(tmp_path / "report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"cannot be written to .*; give another output"):
        Page(made).save(tmp_path / "file" / "report.html")


def test_the_command_and_the_title_are_shown(evidence):
    made = document(evidence, title="A <run>", command="scripts/reproduce softmax & more")
    html = render(made)
    assert "A &lt;run&gt;" in html and "scripts/reproduce softmax &amp; more" in html


def test_a_notebook_gets_scoped_style_and_no_script(evidence, made):
    fragment = Page(made)._repr_html_()
    assert "<script" not in fragment and "<html" not in fragment and "<body" not in fragment
    assert "21.0 % of the training examples" in fragment and "&lt;script&gt;" in fragment
    style = re.search(r"<style>(.*?)</style>", fragment, re.S)[1]
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
    depth, selector, outer = 0, "", []
    for character in style:
        if character == "{":
            outer += [selector.strip()] if depth == 0 else []
            depth, selector = depth + 1, ""
        elif character in "};":
            depth, selector = depth - (character == "}"), ""
        else:
            selector += character
    # Rules outside the scope speak only of the whole page, which a notebook is not.
    for rule in outer:
        assert ".diag-report" in rule or rule.startswith("@media"), rule


def test_the_data_of_another_thing_is_not_written_over(tmp_path, made):
    (tmp_path / "run.json").write_text('{"format_version": 1}')
    with pytest.raises(
        InvalidInput, match=r"would be written over .*run\.json, which was not written with a report"
    ):
        Page(made).save(tmp_path / "run.html")
    assert (tmp_path / "run.json").read_text() == '{"format_version": 1}'
    assert not (tmp_path / "run.html").exists()
    Page(made).save(tmp_path / "report.html")
    Page(made).save(tmp_path / "report.html")  # its own data may be
