"""The documentation: its links lead somewhere, its commands exist, its examples run, and it names what there is."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import diag
from diag.cli import main
from diag.rates import rates
from diag.registry import Kind, instruments

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def writer():
    """scripts/docs_pages.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(writer):
    """Every page of the site by its path: those that are written by hand and those that the code gives."""
    return {p.relative_to(DOCS).as_posix(): p.read_text() for p in DOCS.rglob("*.md")} | writer.pages()


def test_every_link_leads_to_a_page(site):
    for path, text in site.items():
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link and path.endswith(".md"):
                parts = [*Path(path).parent.parts, *link.split("/")]
                steps = []
                for part in parts:
                    steps = steps[:-1] if part == ".." else [*steps, part]
                target = "/".join(steps)
                assert target in site or (DOCS / target).exists(), f"{path} leads to {target}"


def test_every_page_by_hand_is_in_the_order(site, writer):
    in_order = set(writer.listed(writer.PAGES))
    assert in_order <= set(site)
    by_hand = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    further = {file.name for file in writer.further(DOCS)}
    assert by_hand - further <= in_order and all(writer.heading(DOCS / name) for name in further)


def test_every_instrument_has_a_page_with_what_it_returns(site):
    for name, instrument in instruments().items():
        page = site[f"reference/instruments/{name}.md"]
        assert instrument.source.split(",")[0] in page
        assert all(f"`{f.name}`" in page for f in instrument.result.measured_fields())
        assert f"(instruments/{name}.md)" in site["reference/instruments.md"]
        assert all(f"Without `{n.name}` it" in page for n in instrument.needs)


def test_what_is_measured_is_there_as_a_formula(site):
    graphs = {"symmetry_groups"}  # a graph, no number
    measured = {name for name, i in instruments().items() if i.kind is not Kind.CHECK} - graphs
    pages = {name: site[f"reference/instruments/{name}.md"] for name in instruments()}
    assert measured <= {name for name, page in pages.items() if "\n## Formula\n" in page}
    assert all("\n## Why it matters\n" in page for page in pages.values())


def test_the_counts_of_a_check_are_on_its_page(site):
    counted = rates()["batches_repeated"]
    assert (
        f"{counted['named']} of {counted['broken']} trainings" in site["reference/instruments/batches_repeated.md"]
    )
    assert "It has not been counted" in site["reference/instruments/saved_rows.md"]
    assert "<figure><svg" in site["reference/instruments/hessian_spectrum.md"]


def test_names_in_backticks_of_the_rules_are_instruments():
    text = (DOCS / "reference" / "sagemaker.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| [A-Z]\w+ \|", line)]
    assert len(rows) == 21
    for row in rows:
        names = set(re.findall(r"`([a-z_]+)`", row))
        assert names <= set(instruments()), row


def commands(text):
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        yield from (line for line in block.splitlines() if line.startswith("diag "))


@pytest.mark.parametrize("path", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.stem)
def test_every_command_that_is_shown_exists(path):
    context = click.Context(main, info_name="diag")
    for line in commands(path.read_text()):
        words = shlex.split(line, comments=True)[1:]
        command = main.get_command(context, words[0])
        assert command is not None, line
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("-")} <= known, line


@pytest.mark.parametrize("path", [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda p: p.stem)
def test_every_script_that_is_named_is_there_with_its_options(path):
    for name, rest in re.findall(r"`?(scripts/[\w/.]*\w)((?: [^\s`|]+)*)", path.read_text()):
        script = ROOT / name
        assert script.exists(), name
        options, known = re.findall(r"--[a-z-]+", rest), re.findall(r'"(--[a-z-]+)"', source(script))
        assert set(options) <= set(known), (name, options)


def source(script):
    """The text of a script and of the module beside it whose `main` it calls."""
    text = script.read_text() if script.is_file() else ""
    called = [name.replace(".", "/") for name in re.findall(r"from ([\w.]+) import main", text)]
    return "".join([text, *((ROOT / "scripts" / f"{name}.py").read_text() for name in called)])


def test_the_tutorial_runs(tmp_path):
    text = (DOCS / "tutorial.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in commands(text):
        ran = subprocess.run(
            [sys.executable, "-m", *shlex.split(line)], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode in (0, 1) and "Traceback" not in ran.stderr, ran.stderr


def test_the_configuration_that_is_shown_is_read(tmp_path):
    from diag.reporting.machines import policy

    (block,) = re.findall(r"```toml\n(.*?)```", (DOCS / "howto" / "ci.md").read_text(), re.S)
    for text in (block, policy.__doc__.partition("\n")[2]):
        (tmp_path / "pyproject.toml").write_text(text)
        found = policy.read_policy(folder=tmp_path)
        assert found.fail_on == "warning" and len(found.limits) == 2 and found.levels["class_counts"] == "ignore"
        assert found.settings == {"weight_decay": {"shrunk": 0.4}}


def test_every_command_has_json():
    context = click.Context(main, info_name="diag")
    served = {"live", "mcp", "schema"}  # a server, a server, and JSON itself
    without = [
        name
        for name in main.list_commands(context)
        if "--json" not in {o for p in main.get_command(context, name).params for o in p.opts}
    ]
    assert set(without) == served


def test_examples_in_docstrings_run():
    tried = 0
    for module in pkgutil.walk_packages(diag.__path__, "diag."):
        source = importlib.util.find_spec(module.name).origin or ""
        if ">>>" in Path(source).read_text():
            found = doctest.testmod(importlib.import_module(module.name))
            assert found.failed == 0, module.name
            tried += found.attempted
    assert tried > 8


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install diag[docs]")
    pytest.importorskip("material", reason="pip install diag[docs]")
    arguments = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path), "-f", str(ROOT / "mkdocs.yml")]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "llms.txt").exists() and (
        tmp_path / "reference" / "instruments" / "dead_units.html"
    ).exists()
