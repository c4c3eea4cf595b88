"""Two runs side by side, and the gallery."""

import dataclasses
import json
import re

import numpy
import pytest
import report_fakes
from report_fakes import Bare, Collapse, Inapplicable, finding, series

from diag.errors import InvalidInput
from diag.reporting import compare, report
from diag.reporting.comparison.compare import comparison
from diag.reporting.gallery import gallery


def side(title, level, collapsed, **changes):
    rows = series(Collapse, [10, 20], collapsed=collapsed, headroom=1.0, margins=numpy.ones(4), level=level)
    bare = finding("bare", "Bare", series(Bare, [10, 20], ratio=2.0))
    findings = [finding("collapse", "Softmax collapse", rows), bare]
    return report_fakes.evidence(**{"title": title, "findings": findings, "outcomes": [], **changes})


@pytest.fixture(scope="module")
def pair():
    return side("Run a", "alarm", 0.2), side("Run b", "ok", 0.05, history=report_fakes.history(1200, seed=5))


def test_what_became_better_and_what_stayed(pair):
    made = comparison(*pair)
    assert made["verdict"]["headline"] == "B (Run b) is better than A (Run a): softmax collapse in A only"
    assert made["verdict"]["sentence"] == "B against A: one check better and one check the same."
    assert [(c["instrument"], c["change"]) for c in made["checks"]] == [("collapse", "better"), ("bare", "same")]
    assert comparison(*reversed(pair))["checks"][0]["change"] == "worse"
    json.dumps(made, allow_nan=False)


def test_differences_of_scalars(pair):
    rows = {row["name"]: row for row in comparison(*pair)["scalars"]}
    row = rows["collapsed"]
    assert [v["number"] for v in row["values"]] == [0.2, 0.05]
    assert row["difference"]["number"] == pytest.approx(-0.15, abs=1e-12)  # float64 subtraction
    assert row["ratio"] == pytest.approx(0.25, abs=1e-12)


def test_both_curves_share_axis_and_scale(pair):
    curves = comparison(*pair)["curves"]
    assert (curves["first_step"], curves["last_step"]) == (1, 1200)
    loss = curves["panels"][0]
    assert [line["side"] for line in loss["lines"]] == ["A", "B"]
    assert max(loss["lines"][0]["at"]) < 0.76 < 0.99 < max(loss["lines"][1]["at"])
    assert {(line["low_end"], line["high_end"]) for line in loss["lines"]} == {(loss["low_end"], loss["high_end"])}


def test_what_only_one_side_has_is_not_compared(pair):
    extra = finding("inapplicable", "Neural collapse", series(Inapplicable, [10], nc1=0.4))
    more = dataclasses.replace(pair[1], findings=[*pair[1].findings, extra], history=None)
    made = comparison(pair[0], more)
    last = made["checks"][-1]
    assert last["cells"][0] is None and last["change"] == ""
    assert made["verdict"]["sentence"].endswith("1 not judged in both.")
    row = made["scalars"][-1]
    assert row["values"][0] is None and row["difference"] is None and row["ratio"] is None
    assert [line["side"] for line in made["curves"]["panels"][0]["lines"]] == ["A"]


def test_a_difference_has_the_error_of_independent_measurements(pair):
    row = next(row for row in comparison(*pair)["scalars"] if row["name"] == "headroom")
    assert [e["number"] for e in row["errors"]] == [0.4, 0.4]
    assert row["difference_error"]["number"] == pytest.approx(0.4 * 2**0.5, rel=1e-12) and row["is_clear"] is False
    assert "headroom standard error" not in {r["name"] for r in comparison(*pair)["scalars"]}


def test_healthy_runs_give_a_band(pair):
    healthy = [side(f"Run h{i}", "ok", 0.04 + 0.01 * i) for i in range(4)]
    made = comparison(*pair, healthy=healthy)
    row = next(row for row in made["scalars"] if row["name"] == "collapsed")
    assert (row["band"]["low"]["number"], row["band"]["high"]["number"]) == (0.04, pytest.approx(0.07))
    assert row["outside"] == ["A"]
    # Of five exchangeable runs, the fifth is the least or the greatest with probability 2 / 5.
    assert row["band"]["chance"]["number"] == pytest.approx(0.4)
    loss = made["curves"]["panels"][0]["band"]
    assert all(a <= b for a, b in zip(loss["low"], loss["high"], strict=True) if a is not None)
    one = comparison(*pair, healthy=healthy[:1])
    assert all(row["band"] is None for row in one["scalars"]), "one run has no range"


def test_three_runs_are_compared_with_the_first():
    levels = {"x": "warning", "y": "alarm", "z": "ok"}
    runs = [side(f"Run {n}", level, 0.1) for n, level in levels.items()]
    made = comparison(*runs, names=list(levels))
    check = made["checks"][0]
    assert check["changes"] == ["worse", "better"] and check["change"] == "mixed"
    assert made["title"] == "3 runs against x" and made["verdict"]["sentence"].startswith("B to C against A: ")
    assert (
        made["verdict"]["headline"] == "2 of 3 runs have a finding: A (softmax collapse) and B (softmax collapse)"
    )
    assert [row["level"] for row in made["sweep"]["rows"]] == ["warning", "alarm", "ok"]


def test_the_headline_of_two_runs_says_which_is_worse_and_of_what(pair):
    bad, good = pair
    assert comparison(good, bad)["verdict"]["headline"] == "B (Run a) is worse than A (Run b): softmax collapse"
    assert comparison(good, good)["verdict"]["headline"] == "No check tells A (Run b) and B (Run b) apart"
    unlike = comparison(good, dataclasses.replace(good, findings=[]))["verdict"]["headline"]
    assert unlike == "Nothing was judged in both A (Run b) and B (Run b)"


def test_the_headline_of_two_runs_names_no_cause_that_both_have():
    def with_dead(level):
        made = side("Run", "alarm", 0.2)
        dead = series(Collapse, [10], collapsed=0.2, headroom=1.0, margins=numpy.ones(4), level=level)
        return dataclasses.replace(made, findings=[*made.findings, finding("dead", "Dead units", dead)])

    some, none = with_dead("warning"), with_dead("ok")
    assert comparison(none, some)["verdict"]["headline"] == "B (Run) is worse than A (Run): dead units"
    assert comparison(some, none)["verdict"]["headline"] == "B (Run) is better than A (Run): dead units"


def test_the_headline_of_a_sweep_has_the_most_frequent_cause_and_its_rows_the_first_story():
    runs = [side(f"Run {i}", "alarm" if i < 6 else "ok", 0.1) for i in range(9)]
    made = comparison(*runs)
    assert made["verdict"]["headline"] == "6 of 9 runs have a finding, most often (6): softmax collapse"
    assert [row["worst"] for row in made["sweep"]["rows"]] == ["Softmax collapse"] * 6 + [""] * 3
    assert comparison(*runs[6:])["verdict"]["headline"] == "Nothing wrong was found in the 3 runs"


def test_a_sweep_says_which_run_is_best_on_held_out_data():
    def run(title, accuracy):
        return side(title, "ok", 0.1, metrics={"val_acc": [(10, 0.2), (20, accuracy)]})

    said = comparison(run("Run x", 0.6), run("Run y", 0.8), run("Run z", 0.7))["verdict"]["sentence"]
    assert said.endswith(" Best held-out accuracy: 80 %, of B (Run y) at step 20.")
    unlike = comparison(run("Run x", 0.6), run("Run y", 0.8), side("Run z", "ok", 0.1, metrics={}))
    assert "Best held-out" not in unlike["verdict"]["sentence"]


def test_clear_differences_come_first(pair):
    rows = comparison(pair[0], dataclasses.replace(pair[1], findings=side("", "ok", 0.05).findings))["scalars"]
    clear = [row["is_clear"] is True for row in rows]
    assert clear == sorted(clear, reverse=True)


def test_a_sweep_of_fifty_is_one_table_on_a_small_page():
    history = report_fakes.history(300, seed=1)
    runs = []
    for i in range(50):
        changed = dataclasses.replace(history, optimizer={"kind": "SGD", "lr": 0.01 * (1 + i % 5)})
        runs.append(side(f"Run {i}", "alarm" if i % 7 == 0 else "ok", 0.01 * i, history=changed))
    page = compare(*runs)
    made = page.document
    assert [row["key"] for row in made["sweep"]["rows"]][24:28] == ["Y", "Z", "AA", "AB"]
    assert "lr" in made["sweep"]["columns"] and len(page.html) < 1_000_000
    spread = next(row["spread"] for row in made["scalars"] if row["name"] == "collapsed")
    assert (spread["low_of"], spread["high_of"]) == ("A", "AX")
    assert spread["middle"]["number"] == pytest.approx(0.245)


def test_too_few_runs_or_names_are_refused(pair):
    with pytest.raises(InvalidInput, match="asked of one run; give two or more"):
        compare(pair[0])
    with pytest.raises(InvalidInput, match="There are 1 names for 2 runs"):
        compare(*pair, names=["a"])


def test_two_moments_have_no_curves():
    made = comparison({"bare": Bare(ratio=1.0)}, {"bare": Bare(ratio=2.0)})
    assert made["curves"] is None and made["scalars"][0]["difference"]["number"] == 1.0


def test_the_page_of_a_comparison(pair, tmp_path):
    page = compare(*pair, output=tmp_path / "compare.html", command="diag compare runs/a runs/b -o compare.html")
    assert page.path.read_text() == page.html == compare(*pair, command=page.document["command"]).html
    assert "diag compare runs/a" in page.html and "<script>alert" not in page.html
    ids = re.findall(r'\sid="([^"]+)"', page.html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page.html)) <= set(ids)
    fragment = page._repr_html_()
    assert "<script" not in fragment and "better" in fragment


def test_a_gallery_lists_every_report_with_the_command_that_makes_it(pair, tmp_path):
    report(pair[0], tmp_path / "one.html", title="The <first>", command="scripts/reproduce one")
    compare(*pair, output=tmp_path / "deep" / "two.html", command="diag compare a b")
    (tmp_path / "foreign.html").write_text("<p>not ours")
    (tmp_path / "foreign.json").write_text("[1]")
    index = gallery(tmp_path)
    html = index.read_text()
    assert index == tmp_path / "index.html" and gallery(tmp_path).read_text() == html
    for text in (
        "The &lt;first&gt;",
        "scripts/reproduce one",
        'href="deep/two.html"',
        "diag compare a b",
        "One alarm",
    ):
        assert text in html
    assert "foreign" not in html


def test_a_reproduced_paper_is_one_card_with_its_claim_and_numbers(pair, tmp_path):
    folder = tmp_path / "claim"
    report(pair[0], folder / "arm-a.html", title="Arm a")
    report(pair[1], folder / "arm-b.html", title="Arm b")
    rows = [{"what": "margin", "expected": "16.6", "measured": "16.8 nats", "band": "15 to 17", "holds": "yes"}]
    rows += [{"what": "growth", "expected": "0", "measured": "3", "band": "-2 to 2", "holds": "NO"}]
    about = {"name": "claim", "title": "A <claim>", "claim": "It stops.", "source": "arXiv:2501.04697"}
    (folder / "measured.json").write_text(json.dumps(about | {"expectations": rows}))
    html = gallery(tmp_path).read_text()
    for text in ("A &lt;claim&gt;", "It stops.", "16.8 nats", "Did not hold", "1 of 2 numbers in their bands"):
        assert text in html
    assert 'href="claim/arm-a.html"' in html and 'href="claim/arm-b.html"' in html and "<svg" in html
    assert html.count("<article") == 1
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("recorded", ["{}", "[]", "torn", '{"expectations": []}'])
def test_a_card_without_numbers_is_not_said_to_hold(recorded, pair, tmp_path):
    report(pair[0], tmp_path / "claim" / "arm.html", title="Arm")
    (tmp_path / "claim" / "measured.json").write_text(recorded)
    html = gallery(tmp_path).read_text()
    assert "no numbers are recorded" in html and "Held</b>" not in html and "Did not hold" not in html


def test_what_found_most_opens_the_gallery(pair, tmp_path):
    quiet = report_fakes.evidence(findings=[], title="Quiet")
    report(quiet, tmp_path / "a.html", title="Quiet")
    report(pair[0], tmp_path / "b.html", title="Loud")
    html = gallery(tmp_path).read_text()
    assert html.index("Loud") < html.index("Quiet")


def test_a_folder_without_reports(tmp_path):
    with pytest.raises(InvalidInput, match=r"holds no report; make one with diag report RUN"):
        gallery(tmp_path)


def test_what_both_measured_over_time_is_drawn_over_each_other(pair):
    panels = {p["name"]: p for p in comparison(*pair)["curves"]["panels"]}
    assert list(panels) == ["loss", "gradient_norm", "learning_rate", "collapse.collapsed"], (
        "a number that no run moves has no panel"
    )
    collapsed = panels["collapse.collapsed"]
    assert collapsed["label"] == "Softmax collapse: collapsed"
    assert [line["middle"] for line in collapsed["lines"]] == [[0.2, 0.2], [0.05, 0.05]]
