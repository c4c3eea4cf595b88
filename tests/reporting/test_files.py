"""The files of a report: they belong together whenever the process that writes them is killed."""

import json
import os
import shutil
import time

import pytest

from diag.reporting.files import Page, write, write_together
from tests.run.killing import killed_at, operations


def scenario(folder, told):
    write_together({folder / "r.html": "new", folder / "r.json": "new"})
    told(b"w")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_file_operation_page_and_document_are_of_one_report(before, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    if before:
        scenario(base, lambda byte: None)
        for file in base.iterdir():
            file.write_text("old")
    shutil.copytree(base, tmp_path / "whole")
    total, seen = operations(scenario, tmp_path / "whole"), set()
    assert total >= 5
    for at in range(total):
        folder = tmp_path / str(at)
        shutil.copytree(base, folder)
        told, _ = killed_at(at, scenario, folder)
        page, document = (p.read_text() if p.exists() else None for p in (folder / "r.html", folder / "r.json"))
        assert page in ("old" if before else None, "new") and document in (page, None)
        assert not told or page == document == "new"
        seen.add((page, document))
        scenario(folder, lambda byte: None)
        assert (folder / "r.html").read_text() == (folder / "r.json").read_text() == "new"
    assert len(seen) > 1


def test_what_cannot_be_written_leaves_the_report_as_it_was(tmp_path):
    write_together({tmp_path / "r.html": "old", tmp_path / "r.json": "old"})
    with pytest.raises(UnicodeEncodeError):
        write_together({tmp_path / "r.html": "new", tmp_path / "r.json": "\ud800"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"r.html": "old", "r.json": "old"}


def test_what_a_killed_writer_left_is_removed_after_an_hour(tmp_path):
    old, young = tmp_path / ".r.html.1.partial", tmp_path / ".r.html.2.partial"
    for file in (old, young):
        file.write_text("left")
    os.utime(old, (time.time() - 7200,) * 2)
    write(tmp_path / "r.html", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "r.html"]


def test_a_saved_report_is_its_page_and_its_document(tmp_path):
    page = Page({"format": "diag-report", "title": "t"})
    page.__dict__["html"] = "<html>"
    saved = page.save(tmp_path / "new" / "r.html")
    assert saved.path.read_text() == "<html>"
    assert json.loads(saved.path.with_suffix(".json").read_text()) == page.document
