"""The page in a real headless Chromium, with and without scripts, light and dark, on paper and on a phone."""

import os
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


FOLDED = """() => [...document.querySelectorAll("details > :not(summary), .heat")]
  .filter((e) => !e.checkVisibility() || !e.getBoundingClientRect().height).length"""


@pytest.mark.parametrize("scripts", [True, False])
def test_paper_unfolds_everything_and_is_light(visit, scripts):
    page = visit(java_script_enabled=scripts, color_scheme="dark")
    assert page.evaluate(FOLDED) > 10
    page.emulate_media(media="print")
    assert page.evaluate(FOLDED) == 0
    # The tokens are light: near-black ink.
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(30, 31, 36)"
    assert not page.locator("nav").first.is_visible()


def test_printing_opens_and_closes_what_is_folded(visit):
    page = visit()
    closed = page.locator("details:not([open])").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert closed > 0 and page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed
    assert len(page.pdf()) > 10_000


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
    curve, heat = page.locator(".curve").first, page.locator(".map").first
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
    compare(evidence, evidence, tmp_path / "two.html")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.goto(gallery(tmp_path).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("link", name="Run mine and Run mine").click()
    page.locator("#scalars thead button").nth(1).click()
    assert page.locator("#scalars th[aria-sort='descending']").count() == 1
    assert page.locator(".curve path.of-B").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    page.close()
