"""check, show, compare and report of recorded runs."""

import json
import math

import pytest
import torch

from diag.result import Failed
from diag.run.reading import read_run
from diag.run.writer import RunWriter


def test_check_fails_on_an_alarm_and_says_which(run_diag, make_run):
    bad = run_diag("check", make_run("bad", 1000.0))
    assert bad.exit_code == 1
    assert "✖ alarm  Softmax collapse" in bad.stdout
    assert bad.stdout.rstrip().splitlines()[-1].startswith("FAILED: 1 alarm, ")
    good = run_diag("check", make_run("good", 1.0))
    assert good.exit_code == 0 and good.stdout.startswith("passed: ") and "alarm" not in good.stdout


def test_check_fails_on_a_warning_only_where_asked(run_diag, make_run, monkeypatch):
    folder = make_run("run", 1000.0)
    run = read_run(folder)
    alarm = next(f for f in run.findings() if f.verdict.level == "alarm")
    milder = type(alarm.verdict)("warning", "It is a little collapsed.")
    monkeypatch.setattr(type(alarm.series[0][1]), "trend", classmethod(lambda cls, series: milder))
    assert run_diag("check", folder).exit_code == 0
    assert run_diag("check", folder, "--fail-on", "alarm").exit_code == 0
    warned = run_diag("check", folder, "--fail-on", "warning")
    assert warned.exit_code == 1 and "It is a little collapsed." in warned.stdout


def test_check_of_nothing_is_no_success(run_diag, broken_run, tmp_path):
    nothing = run_diag("check", broken_run)
    assert nothing.exit_code == 2 and "Nothing was measured in" in nothing.stderr
    missing = run_diag("check", tmp_path / "nowhere")
    assert missing.exit_code == 2 and "nowhere holds no run (there is no such folder)" in missing.stderr


def test_check_names_what_broke(run_diag, make_run):
    folder = make_run("run", 1.0)
    with RunWriter(folder, {"layers": {"body.weight": 6, "head.weight": 4}}, resume=True) as w:
        w.append_outcome(5, Failed("neural_collapse", "broke"))
    result = run_diag("check", folder)
    assert result.exit_code == 0 and "Broke while measuring, so not judged: neural_collapse" in result.stderr


def test_check_says_what_is_damaged(run_diag, make_run):
    folder = make_run("run", 1.0)
    data = bytearray((folder / "steps.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "steps.bin").write_bytes(data)
    assert "1 row of steps.bin is damaged and left out." in run_diag("check", folder).stderr
    assert "damaged: 1 row of steps.bin is damaged and left out." in run_diag("show", folder).stdout


def test_show_has_facts_verdicts_skips_and_events(run_diag, make_run):
    shown = run_diag("show", make_run("run", 1000.0))
    assert shown.exit_code == 0
    for text in (
        "10 s, of which diag 2 %",
        "✖ alarm  Softmax collapse",
        "Try: ",
        "steps 50–100 · ",
        "neural_collapse: features are missing; give a last Linear. (2 times, last at step 100)",
        "not observed: The loss was computed by hand; give loss_fn=.",
    ):
        assert text in shown.stdout
    assert shown.stdout.index("alarm") < shown.stdout.index("✔ ok")
    assert not any(line.endswith(" ") for line in shown.stdout.split("\n"))


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_no_line_is_wider_than_the_terminal(columns, run_diag, make_run):
    a, b = make_run("a", 1000.0), make_run("b", 1.0)
    for command in (
        ["show", a],
        ["show", a, "--instrument", "softmax_collapse"],
        ["compare", a, b, "--all"],
        ["list"],
    ):
        result = run_diag(*command, columns=columns)
        assert result.exit_code == 0 and max(map(len, result.stdout.split("\n"))) <= columns


def test_show_of_one_instrument_has_its_numbers_by_step(run_diag, make_run):
    result = run_diag("show", make_run("run", 1000.0), "--instrument", "softmax_collapse")
    rows = [line.split() for line in result.stdout.split("\n")]
    assert rows[0] == ["step", "50", "100"] and ["collapsed", "1", "1"] in rows
    many = run_diag("show", make_run("many", 1.0, range(1, 101)), "--instrument", "softmax_collapse")
    steps = many.stdout.split("\n")[0].split()
    assert steps[1] == "1" and steps[-1] == "100" and len(steps) < 9
    absent = run_diag("show", make_run("run", 1.0), "--instrument", "neural_collapse")
    assert absent.exit_code == 2 and "neural_collapse measured nothing in this run; it has" in absent.stderr


def test_compare_puts_two_runs_side_by_side(run_diag, make_run, tmp_path):
    result = run_diag("compare", make_run("a", 1000.0), make_run("b", 1.0), "-o", "compare.html")
    assert result.exit_code == 0 and f"Comparison: {tmp_path}/compare.html" in result.stdout
    assert (tmp_path / "compare.html").stat().st_size > 1000
    lines = result.stdout.split("\n")
    assert lines[0].split() == ["a", "b"]
    assert any("✖ alarm" in line and "✔ ok" in line for line in lines)
    assert any(line.split() == ["collapsed", "1", "0", "-1"] for line in lines)
    assert "more are equal (--all shows them)" in result.stdout
    assert not any(line.startswith("loss ") for line in lines)
    everything = run_diag("compare", tmp_path / "a", tmp_path / "b", "--all").stdout
    assert any(line.startswith("loss ") for line in everything.split("\n"))
    said = next(line for line in lines if "say the same of both (--all shows them)." in line)
    same, every = (int(word) for word in said.split() if word.isdigit())
    assert same == every - 1 and everything.count("✔ ok") > result.stdout.count("✔ ok")


def test_the_file_of_a_run_stands_for_its_folder(run_diag, make_run):
    folder = make_run("run", 1.0)
    assert run_diag("show", folder / "run.json").stdout == run_diag("show", folder).stdout != ""


def test_compare_of_checkpoints_says_what_changed(run_diag, tmp_path):
    for name, bias in (("a", 0.0), ("b", 1.0), ("c", math.nan)):
        torch.save({"w": torch.eye(3), "b": torch.full((3,), bias)}, tmp_path / f"{name}.pt")
    told = " ".join(run_diag("compare", "a.pt", "b.pt", columns=400).stdout.split())
    assert (
        "Since a.pt the weights moved by 100 % of their norm, most of all b (from zero)" in told
        and "1 of 2 did not change: w" in told
    )
    result = run_diag("compare", "a.pt", "b.pt", "c.pt", "-o", "compare.html")
    assert result.exit_code == 0 and "C: c.pt" in result.stdout
    (tmp_path / "empty").mkdir()
    assert "empty holds no run, and as a checkpoint: " in run_diag("compare", "a.pt", "empty").stderr


def test_compare_of_runs_with_one_name_shows_their_paths(run_diag, make_run, tmp_path):
    (tmp_path / "x").mkdir()
    (make_run("run", 1.0)).rename(tmp_path / "x" / "run")
    make_run("run", 1.0)
    first = run_diag("compare", "x/run", "run").stdout.split("\n")[0]
    assert first.split() == ["A:", "x/run", "B:", "run"]


def test_report_of_a_run(run_diag, make_run, tmp_path):
    result = run_diag("report", make_run("run", 1000.0), "-o", "out/page.html")
    assert (
        result.exit_code == 0
        and f"Report: {tmp_path}/out/page.html" in result.stdout
        and "✖ alarm" in result.stdout
    )
    page = (tmp_path / "out" / "page.html").read_text()
    assert "Softmax collapse" in page and json.loads((tmp_path / "out" / "page.json").read_text())


def test_report_with_chosen_instruments_and_settings(run_diag, make_run, tmp_path):
    folder = make_run("run", 1000.0)
    only = run_diag("report", folder, "--instrument", "gradient_flow", "--set", "gradient_flow.depth_factor=7")
    assert only.exit_code == 0 and "Softmax" not in only.stdout and "Gradient flow" in only.stdout
    assert '"depth_factor"' in (tmp_path / "report.json").read_text()
    late = run_diag("report", folder, "--set", "softmax_collapse.alarm_at=1")
    assert late.exit_code == 2
    assert "softmax_collapse was measured during the training, so its settings cannot be changed" in late.stderr


def test_what_is_computed_of_a_log_takes_other_settings_and_what_a_watch_recorded_does_not(run_diag, tmp_path):
    rows = "".join(f"{step},{2 / step if step < 60 else 30 * step}\n" for step in range(1, 120))
    (tmp_path / "log.csv").write_text("step,loss\n" + rows)
    assert run_diag("import", "log.csv", "-o", "imported").exit_code == 0
    for times, level in ((5, "alarm"), (1e9, "unknown")):
        done = run_diag("report", "imported", "--set", f"divergence.times={times}")
        assert done.exit_code == 0, done.stderr
        made = json.loads((tmp_path / "report.json").read_text())
        assert {a["id"]: a["level"] for a in made["audits"]}["divergence"] == level
    run = read_run(tmp_path / "imported")
    with RunWriter(tmp_path / "watched", {"layers": {}}) as writer:
        writer.append_steps(run.history)
        writer.append_outcome(100, run.series("divergence")[-1][1])
    refused = run_diag("report", "watched", "--set", "divergence.times=9")
    assert refused.exit_code == 2 and "divergence was measured during the training" in refused.stderr


def test_a_report_may_not_overwrite_the_run(run_diag, make_run):
    folder = make_run("run", 1.0)
    for command in (["report", folder], ["compare", folder, folder]):
        result = run_diag(*command, "-o", folder / "run.html")
        assert result.exit_code == 2 and "would be written over" in result.stderr
    assert read_run(folder).instruments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["report", "nowhere"], "There is no nowhere; give a run's folder, or checkpoints."),
        (
            ["report", "net.pt", "run"],
            "Runs and checkpoints were given together; give one run, or checkpoints alone.",
        ),
        (["report", "run", "run"], "A report is of one run; give one, or use diag compare for two."),
        (["report", "run", "-o", "page.pdf"], "expected a name that ends in .html"),
        (["report", "run", "--instrument", "gradient_flo"], "There is no instrument 'gradient_flo'; did you mean"),
        (["report"], "Missing argument 'RUN|CKPT...'"),
        (["repot"], "No such command 'repot'"),
        (["check", "run", "--fail-on", "doom"], "'doom' is not one of 'alarm', 'warning'"),
        (
            ["show", "run", "--instrument", "nothing_like_it"],
            "There is no instrument 'nothing_like_it'; `diag list` shows all there are.",
        ),
        (["compare", "run"], "There is one run, run; give at least two."),
        (["compare", "run", "net.pt"], "net.pt holds no run"),
        (["compare", "net.pt", "nowhere.pt"], "nowhere.pt holds no run (there is no such folder)"),
        (
            ["compare", "net.pt", "run"],
            "run is a run and net.pt a checkpoint; give runs, or checkpoints, or a build",
        ),
        (["show", "log.csv"], "log.csv is a log and no checkpoint; make a run of it: diag import log.csv -o RUN."),
        (["compare", "run", "log.csv"], "log.csv is a log and no checkpoint"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, text, run_diag, make_run, tmp_path):
    make_run("run", 1.0)
    torch.save({"w": torch.ones(1)}, tmp_path / "net.pt")
    (tmp_path / "log.csv").write_text("step,loss\n1,2.0\n")
    result = run_diag(*arguments)
    assert result.exit_code == 2 and text in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_run_that_is_locked_or_newer_is_still_one_sentence(run_diag, make_run):
    folder = make_run("run", 1.0)
    with RunWriter(folder, {"layers": {"body.weight": 6, "head.weight": 4}}, resume=True):
        assert run_diag("check", folder).exit_code == 0, "a run may be read while it is written"
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"format_version": 9}))
    result = run_diag("check", folder)
    assert result.exit_code == 2 and "has run format 9" in result.stderr
