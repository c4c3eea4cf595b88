"""What the README shows works as it stands."""

import re
from pathlib import Path

from diag.registry import instruments
from diag.testing import check_instrument

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_instrument_in_the_readme_keeps_the_contract(tmp_path, monkeypatch):
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "@instrument" in b)
    (tmp_path / "shown.py").write_text(code)  # a file, since annotations are resolved in its module
    monkeypatch.syspath_prepend(tmp_path)
    check_instrument(__import__("shown").dead_units)


def test_the_readme_names_every_instrument():
    missing = [name for name in instruments() if f"`{name}`" not in README]
    assert not missing


def test_files_that_the_readme_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_sizes_that_the_readme_states():
    own = sum(f.stat().st_size for f in (ROOT / "diag").rglob("*") if f.is_file() and f.suffix != ".pyc")
    stated = re.search(r"diag itself is\s+(\d+)\s+MB", README)
    assert int(stated[1]) == round(own / 1e6)
    page = re.search(r"making the page of the demo; [^|]+\| ([\d.]+) MB", README)
    assert float(page[1]) == round((ROOT / "reports" / "demo" / "report.html").stat().st_size / 1e6, 2)
