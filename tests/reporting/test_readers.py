"""Readers' tasks on the page, by keyboard alone, with and without scripts, in as many steps as the documentation
says.

Also what axe, the accessibility checker, says of the pages.
"""

import json
import os
import re
from importlib import resources
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install diag[test]"
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"the browser tests need Chromium at {CHROMIUM}: apt-get install chromium"
)
SIZES = {"desk": {"width": 1440, "height": 900}, "phone": {"width": 390, "height": 844}}
MOST_TABS = 150


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def addresses(html, evidence, tmp_path_factory):
    """The page of a report and that of a comparison."""
    import report_fakes

    from diag.reporting import compare

    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(html, encoding="utf-8")
    other = report_fakes.evidence(title="Run other")
    compare(evidence, other, output=folder / "compare.html")
    return {name: (folder / f"{name}.html").as_uri() for name in ("report", "compare")}


@pytest.fixture(params=["scripts", "no scripts"])
def scripts(request):
    return request.param == "scripts"


class Reader:
    """Somebody who opens a page and presses keys only; `steps` counts what was followed or pressed."""

    def __init__(self, browser, address, scripts, size):
        scheme = "light" if scripts == (size == "desk") else "dark"  # with each size, and with and without scripts
        self.context = browser.new_context(viewport=SIZES[size], java_script_enabled=scripts, color_scheme=scheme)
        self.page, self.steps = self.context.new_page(), 0
        self.page.goto(address)

    def enter(self, selector):
        """Tab to the first element that `selector` names and press Enter."""
        wanted = self.page.locator(selector).first
        for _ in range(MOST_TABS):
            self.page.keyboard.press("Tab")
            if wanted.evaluate("e => e === document.activeElement"):
                self.page.keyboard.press("Enter")
                self.steps += 1
                return
        raise AssertionError(f"{selector} is not reached by {MOST_TABS} tabs")

    def sees(self, selector):
        """Whether the first such element is in the window."""
        found = self.page.locator(selector).first
        found.wait_for(state="visible", timeout=3000)
        return found.evaluate(
            "e => { const b = e.getBoundingClientRect(); return b.top < innerHeight && b.bottom > 0; }"
        )


@pytest.fixture(params=list(SIZES))
def reader(browser, addresses, scripts, request):
    opened = []

    def start(name):
        opened.append(Reader(browser, addresses[name], scripts, request.param))
        return opened[-1]

    yield start
    for one in opened:
        one.context.close()


def stated():
    """The steps that the documentation states, by task."""
    text = (Path(__file__).parents[2] / "docs" / "howto" / "page.md").read_text()
    return {what: int(steps) for what, steps in re.findall(r"^\| ([^|]+?) \| [^|]+ \| (\d) \|$", text, re.M)}


def test_no_task_takes_more_than_three_steps():
    assert len(stated()) == 5 and max(stated().values()) <= 3


def test_the_state_is_on_the_first_screen(reader):
    one = reader("report")
    assert one.sees("h1") and one.sees(".told li") and one.page.locator(".told .try").count()


def test_the_worst_layer(reader):
    one = reader("report")
    one.enter(".told a.name")
    assert "head" in one.page.locator("#check-collapse dl", has_text="Layers").last.text_content()
    assert one.sees("#check-collapse") and one.steps == stated()["the worst layer"]


def test_the_rows(reader):
    one = reader("report")
    one.enter(".told a.name[href='#check-opposing']")
    assert re.search(r"row \d+", one.page.locator("#check-opposing .group").first.text_content())
    assert one.sees("#check-opposing") and one.steps == stated()["the rows"]


def test_the_step_where_things_turned(reader):
    one = reader("report")
    one.enter("nav a[href='#timeline']")
    bar = one.page.locator(".timeline a.span[href='#check-opposing']").first
    assert re.search(r"steps? 600", bar.get_attribute("aria-label"))
    assert one.sees("#timeline") and one.steps == stated()["the step where things turned"]


def test_the_data(reader, scripts, made):
    one = reader("report")
    one.enter("nav a[href='#data']")
    assert one.sees("#data")
    if not scripts:
        assert ".json" in one.page.locator("#data").text_content()
        return
    with one.page.expect_download() as waiting:
        one.enter("#download")
    got = json.loads(Path(waiting.value.path()).read_text())
    assert got["audits"] == made["audits"] and one.steps == stated()["the data"]


def test_two_runs_compared(reader, scripts):
    one = reader("compare")
    assert one.sees("h1")
    one.enter("nav a[href='#scalars']")
    assert one.sees("#scalars")
    if scripts:
        one.enter("#scalars thead th:nth-child(4) button")
        assert one.page.locator("#scalars th[aria-sort]:not([aria-sort='none'])").count() == 1
    assert one.steps <= stated()["two runs compared"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("size", list(SIZES))
def test_axe_finds_nothing_serious(browser, addresses, name, size, scheme):
    pytest.importorskip("axe_playwright_python", reason="axe needs axe-playwright-python: pip install diag[test]")
    script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
    page.goto(addresses[name])
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.evaluate(script)
    found = page.evaluate("axe.run()")["violations"]
    page.close()
    serious = [
        (v["id"], v["help"], [n["target"] for n in v["nodes"]][:4])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert not serious
