"""The page in a real headless Chromium, with and without scripts, light and dark, on paper and on a phone."""

import os
import re
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install diag[test]"
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"the browser tests need Chromium at {CHROMIUM}: apt-get install chromium"
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(html, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html, encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page in a context of its own; what went wrong and what was asked for is kept."""
    contexts = []

    def opened(fragment="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.problems, page.requests = [], []
        page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("dialog", lambda d: (page.problems.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda r: page.requests.append(r.url))
        page.goto(address + fragment)
        return page

    yield opened
    for context in contexts:
        context.close()


def column(page, number):
    return page.eval_on_selector_all(
        "#layers-table tbody tr:not([hidden])", f"rows => rows.map(r => r.cells[{number}].textContent.trim())"
    )


IN_VIEW = """selector => {
  const e = document.querySelector(selector), box = e.getBoundingClientRect();
  return e.checkVisibility() && box.top < innerHeight && box.bottom > 0;
}"""


def test_no_error_no_request_and_no_script_of_the_model(visit, address):
    page = visit()
    page.mouse.move(700, 500)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(100)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith("data:")] == [address]
    assert page.locator("script").count() == 2
    assert page.locator("#layers-table th", has_text="<script>alert(1)</script>").count() == 1


@pytest.mark.parametrize("scripts", [True, False])
def test_every_link_within_the_page_leads_to_something_visible(visit, scripts):
    page = visit(java_script_enabled=scripts)
    targets = page.eval_on_selector_all("a[href^='#']", "links => [...new Set(links.map(a => a.hash))]")
    assert {"#findings", "#timeline", "#layers", "#checks", "#method", "#data"} <= set(targets)
    assert {"#check-collapse", "#check-bare", "#check-curvature", "#checks-ok"} <= set(targets)
    for target in targets:
        page.goto(page.url.split("#")[0] + target)
        page.wait_for_function(IN_VIEW, arg=target, timeout=5000)


def test_following_a_link_unfolds_what_it_leads_to(visit):
    page = visit()
    assert not page.locator("#check-bare").is_visible()
    page.locator("details.lanes > summary").click()
    page.locator("a.span[href='#check-bare']").click()
    page.locator("#check-bare").wait_for(state="visible")


def test_sorting_by_mouse_and_by_keyboard(visit):
    page = visit()
    names = column(page, 0)
    head = page.locator("#layers-table thead th").nth(1)
    head.locator("button").click()
    sizes = [int(v.replace(",", "")) for v in column(page, 1)]
    assert sizes == sorted(sizes, reverse=True) and head.get_attribute("aria-sort") == "descending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    sizes = [int(v.replace(",", "")) for v in column(page, 1)]
    assert sizes == sorted(sizes) and head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert column(page, 0) == names and head.get_attribute("aria-sort") == "none"
    page.locator("#layers-table thead button").nth(2).click()
    medians = [float(v) for v in column(page, 2)]
    assert medians == sorted(medians, reverse=True)
    page.locator("#layers-table thead button").first.click()
    assert column(page, 0) == sorted(names, key=lambda n: n.lower())


def test_filtering(visit):
    page = visit()
    page.locator("#layer-filter").fill("conv BIAS")
    assert column(page, 0) == ["conv1.bias", "conv2.bias"]
    assert page.locator("#layer-count").text_content() == "2 of 10"
    page.locator("#layer-filter").fill("")
    assert len(column(page, 0)) == 10


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_dark_and_the_toggle_that_is_remembered(visit):
    light, dark = ground(visit(color_scheme="light")), ground(page := visit(color_scheme="dark"))
    assert light != dark
    page.locator("#theme").click()
    assert ground(page) == light and page.locator("#theme").text_content() == "Dark"
    page.reload()
    assert ground(page) == light


# Relative luminance and contrast as WCAG 2 defines them; colours are resolved by painting a pixel.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return c; } return "white"; };
  const low = [];
  for (const e of document.querySelectorAll("main :is(p, h1, h2, dd, dt, li, a, td, th, summary, .badge)")) {
    if (!e.textContent.trim() || !e.checkVisibility()) continue;
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.className + " " + e.textContent.trim().slice(0, 40));
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks(visit, scheme):
    page = visit(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate(CONTRAST) == []


FOLDED = """() => [...document.querySelectorAll("#findings details.follows > :not(summary)")]
  .filter((e) => !e.checkVisibility() || !e.getBoundingClientRect().height).length"""


@pytest.mark.parametrize("scripts", [True, False])
def test_paper_has_what_matters_and_is_light(visit, scripts):
    page = visit(java_script_enabled=scripts, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate(FOLDED) == 0
    for shown in ("h1", ".told", ".outcome", "#check-collapse .claim", ".timeline .curve", "#checks-ok .names"):
        assert page.locator(shown).first.is_visible(), shown
    for left_out in ("nav", "#check-bare", "#data", "#check-collapse .more", "#method table"):
        assert not page.locator(left_out).first.is_visible(), left_out
    # The tokens are light: near-black ink.
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(30, 31, 36)"


def test_the_print_has_at_most_eight_pages(visit):
    pdf = visit().pdf(format="A4", prefer_css_page_size=False)
    assert 1 <= len(re.findall(rb"/Type\s*/Page[^s]", pdf)) <= 8


def test_printing_opens_what_follows_and_closes_it(visit):
    page = visit()
    page.evaluate("document.querySelector('#findings').insertAdjacentHTML('beforeend', "
                  "'<details class=follows><summary>s</summary>t</details>')")  # fmt: skip
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.follows:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.follows:not([open])").count() > 0


def test_a_stretch_of_steps_can_be_looked_at_closely(visit):
    page = visit()
    curve, box = page.locator(".timeline .curve").first, None
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=3)
    page.mouse.up()
    views = page.eval_on_selector_all("[data-axis] .curve svg", "all => all.map((e) => e.getAttribute('viewBox'))")
    assert len(set(views)) == 1, "all curves show the same steps"
    x, _, width, _ = map(float, views[0].split())
    assert abs(x - 250) < 8 and abs(width - 250) < 8  # of 1000, to a pixel or two
    other = "[data-axis] .plot:not(.curve, .axis)"
    clipped = page.eval_on_selector_all(other, "all => all.map((e) => getComputedStyle(e).overflowX)")
    assert set(clipped) == {"clip"} and page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.locator(".timeline .curve svg").first.evaluate("(e) => getComputedStyle(e).overflow") == "hidden"
    ticks = page.locator(".timeline > .shared .axis span").all_text_contents()
    assert all(225 <= int(t.replace(",", "")) <= 455 for t in ticks) and len(ticks) > 2
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    step = int(re.match(r"step (\d+)", page.locator(".timeline .readout").text_content())[1])
    assert abs(step - 338) < 8  # the middle of the middle quarter of 900 steps
    page.locator("[data-zoom='all']").focus()
    page.keyboard.press("Enter")
    assert page.locator(".timeline .curve svg").first.get_attribute("viewBox") == "0 0 1000 100"
    page.locator("[data-zoom='in']").click()
    assert page.locator(".timeline .curve svg").first.get_attribute("viewBox") == "250 0 500 100"


def test_a_finding_lights_its_steps_and_layers(visit):
    page = visit()
    page.locator(".told li").first.hover()
    assert page.locator(".timeline .curve > .lit").count() > 0
    assert page.locator("#layers-table tr.lit").count() == 3  # head.weight, head.bias and one more
    page.mouse.move(0, 0)
    assert page.locator(".lit").count() == 0


def test_a_drawing_says_the_value_under_the_pointer(visit):
    page = visit()
    chart = page.locator("#check-collapse svg[data-plot]").first
    chart.scroll_into_view_if_needed()
    chart.hover()
    box = chart.bounding_box()
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        if page.locator(".tip").is_visible():
            break
    assert re.match(r"step \d", page.locator(".tip").text_content())


def test_readable_with_scripts_off(visit):
    page = visit(java_script_enabled=False)
    for text in ("One alarm and one warning", "What to try", "Layers", "How this was measured"):
        assert page.get_by_text(text).first.is_visible()
    for comfort in ("#theme", ".filter", "#download", "#layers-table button"):
        assert page.locator(comfort).count() == 0 or not page.locator(comfort).first.is_visible()
    page.locator("#checks-ok > summary").click()
    assert page.locator("#check-bare").is_visible()
    page.locator("label[for='heat-update_ratio']").click()
    assert page.locator(".heat-update_ratio").is_visible() and not page.locator(".heat-gradient_norm").is_visible()


@pytest.mark.parametrize("width", [360, 820, 1600])
def test_no_width_makes_the_page_scroll_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_pointer_reads_the_curves_and_the_map(visit):
    page = visit()
    curve, heat = page.locator(".timeline .curve").first, page.locator(".map").first
    curve.hover()
    assert "step 4" in page.locator(".timeline .readout").text_content()
    assert "training loss" in page.locator(".timeline .readout").text_content()
    heat.hover(position={"x": 2, "y": 2})
    assert page.locator(".heat-gradient_norm .readout").text_content().startswith("conv1.weight · steps 1–5 · 0.")
    heat.hover(
        position={"x": heat.bounding_box()["width"] * 700.5 / 900, "y": heat.bounding_box()["height"] * 0.45}
    )
    assert page.locator(".heat-gradient_norm .readout").text_content().endswith("not finite")


def test_everything_that_acts_can_be_reached_by_keyboard(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)"))
    assert {"theme", "layer-filter", "download", "heat-gradient_norm", "SUMMARY", "BUTTON"} <= reached


def test_the_data_can_be_downloaded(visit, made):
    import json

    page = visit()
    with page.expect_download() as waiting:
        page.locator("#download").click()
    got = json.loads(Path(waiting.value.path()).read_text())
    assert got == {key: value for key, value in made.items() if key != "drawings"}


def test_the_downloaded_data_have_the_texts_about_the_checks(browser, tmp_path):
    import json

    import torch

    import diag

    result = diag.softmax_collapse(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0]))
    report = diag.report({"softmax_collapse": result}, tmp_path / "page.html")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    with page.expect_download() as waiting:
        page.locator("#download").click()
    got = json.loads(Path(waiting.value.path()).read_text())
    page.close()
    assert len(got["audits"][0]["documentation"]) > 100
    assert got == {key: value for key, value in report.document.items() if key != "drawings"}


def test_a_text_about_a_check_may_begin_as_the_name_of_a_card_does(browser, made, tmp_path):
    import json

    from diag.reporting import render

    texts = {audit["id"]: "# What it is" for audit in made["audits"] if audit["level"] == "skipped"}
    document = made | {"audits": [a | {"documentation": texts.get(a["id"], "")} for a in made["audits"]]}
    (tmp_path / "page.html").write_text(render(document), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    with page.expect_download(timeout=5_000) as waiting:
        page.locator("#download").click()
    got = json.loads(Path(waiting.value.path()).read_text())
    page.close()
    assert texts and got["audits"] == document["audits"]


def test_a_notebook_fragment_leaves_its_surroundings_alone(browser, made):
    from diag.reporting import Page

    page = browser.new_page()
    outside = "<p id='outside' style='font: 20px serif'>outside</p><table><tr><th>a</th></tr></table>"
    look = """() => ["#outside", "th", "body"].map((s) => getComputedStyle(document.querySelector(s)))
      .map((s) => [s.color, s.backgroundColor, s.padding, s.margin, s.fontSize, s.fontFamily, s.borderTop])"""
    page.set_content(outside)
    plain = page.evaluate(look)
    page.set_content(outside + Page(made)._repr_html_())
    assert page.evaluate(look) == plain
    assert page.locator(".diag-report .claim").first.is_visible()
    page.close()


def test_a_comparison_and_a_gallery_work_as_well(browser, evidence, tmp_path):
    from diag.reporting import compare, report
    from diag.reporting.gallery import gallery

    report(evidence, tmp_path / "one.html", command="diag demo")
    compare(evidence, evidence, output=tmp_path / "two.html")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.goto(gallery(tmp_path).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("link", name="Run mine and Run mine").click()
    page.locator("#scalars thead button").nth(1).click()
    assert page.locator("#scalars th[aria-sort='descending']").count() == 1
    assert page.locator(".curve path.of-1").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    page.close()


@pytest.fixture(scope="module")
def odd_pages(tmp_path_factory):
    """A record without curves, as that of checkpoints, and a sweep of many runs."""
    import report_fakes

    from diag.reporting import compare, document, render

    folder = tmp_path_factory.mktemp("odd")
    files = [{"step": 100 * i, "path": f"{i}.pt"} for i in range(3)]
    bare = report_fakes.evidence(history=None, events=[], findings=[], metrics={}, metadata={"checkpoints": files})
    few = report_fakes.evidence(history=None, events=[], metrics={}, metadata={"checkpoints": files})
    for name, evidence in (("bare", bare), ("few", few)):
        (folder / f"{name}.html").write_text(render(document(evidence, drawings=False)), encoding="utf-8")
    compare(
        *(report_fakes.evidence(title=f"Run of a name that is long, {i}") for i in range(20)),
        output=folder / "sweep.html",
    )
    return folder


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["bare", "few", "sweep"])
def test_an_odd_page_runs_its_scripts_and_fits_the_window(browser, odd_pages, name, width):
    page, problems = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((odd_pages / f"{name}.html").as_uri())
    assert problems == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
