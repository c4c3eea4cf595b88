"""What the README shows works as it stands."""

import re
from pathlib import Path

from diag.registry import instruments
from diag.testing import check_instrument

README = (Path(__file__).parents[1] / "README.md").read_text()


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
    assert not [link for link in links if not (Path(__file__).parents[1] / link).exists()]
