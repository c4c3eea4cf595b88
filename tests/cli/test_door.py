"""The group itself: help without torch, the list of instruments, the demo, and commands of other parts."""

import json
import subprocess
import sys
import types

import click
import pytest

import diag
from diag.cli.door import Door
from diag.errors import RunError
from diag.registry import instruments
from diag.run.entries import Record
from diag.run.run import Run


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from diag.cli import main\n"
        "try: main(['report', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--build MODULE:FUNCTION" in shown and shown.rstrip().endswith("[]")


def test_help_names_every_command(run_diag):
    shown = run_diag("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {name} " in shown.stdout for name in ("check", "compare", "demo", "list", "report", "show"))
    assert run_diag("--version").stdout.startswith("diag, version ")


def test_list_has_every_instrument_with_all_about_it(run_diag):
    shown = run_diag("list")
    assert shown.exit_code == 0
    for i in instruments().values():
        assert f"\n{i.name}\n" in "\n" + shown.stdout
        assert " ".join(i.summary.split()) in " ".join(shown.stdout.split())
    known = {row["name"]: row for row in json.loads(run_diag("list", "--json").stdout)["instruments"]}
    assert set(known) == set(instruments())
    softmax = known["softmax_collapse"]
    assert softmax["source"] == instruments()["softmax_collapse"].source
    assert {"name": "logits", "optional": False} in softmax["needs"]
    assert {"name": "alarm_at", "default": 0.5, "type": "float"} in softmax["settings"]


def test_an_error_of_diag_is_one_sentence_and_another_is_not_hidden():
    @click.group(cls=Door)
    def group():
        pass

    @group.command()
    def mistake():
        raise RunError("It is not there; look elsewhere.")

    @group.command()
    def bug():
        raise ZeroDivisionError

    from click.testing import CliRunner

    result = CliRunner().invoke(group, ["mistake"])
    assert (result.exit_code, result.stderr) == (2, "Error: It is not there; look elsewhere.\n")
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(group, ["bug"], catch_exceptions=False)


def test_another_part_brings_its_commands(run_diag, monkeypatch):
    @click.command("hello", short_help="Greets.")
    def hello():
        click.echo("hello")

    part = types.ModuleType("a_part")
    part.COMMANDS = [hello]
    part.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "a_part", part)
    monkeypatch.setattr("diag.cli.door.OTHER_PARTS", ("a_part", "a_part_that_is_not_there"))
    assert "hello " in run_diag("--help").stdout and run_diag("hello").stdout == "hello\n"


def test_the_demo_prints_the_verdicts_and_where_the_report_is(run_diag, make_run, monkeypatch, tmp_path):
    from diag.run.reading import read_run

    asked = {}

    def train(folder, *, seed=0, progress=None):
        asked.update(folder=folder, seed=seed)
        for done in range(3):
            progress(done, 3, "Training")
        return read_run(make_run("demo", 1000.0))

    part = types.ModuleType("diag.demo")
    part.run = train
    monkeypatch.setitem(sys.modules, "diag.demo", part)
    monkeypatch.setitem(vars(diag), "demo", part)
    result = run_diag("demo", "--folder", "demo", "--seed", "4")
    assert result.exit_code == 0, result.output
    assert str(asked["folder"]) == "demo" and asked["seed"] == 4
    assert result.stdout.startswith("✖ alarm") and result.stdout.endswith(
        f"\nReport: {tmp_path}/demo/report.html\n"
    )
    assert (tmp_path / "demo" / "report.html").exists()


def test_a_run_without_anything_is_shown(run_diag, broken_run):
    shown = run_diag("show", broken_run)
    assert "Nothing was measured." in shown.stdout and "failed  softmax_collapse: ValueError: broke" in shown.stdout
    assert Run(records=[Record(0, "x", None)]).instruments == ()
