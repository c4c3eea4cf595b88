"""`--json` on every command fits the published schema; `diag check` with a baseline, limits, JUnit, SARIF."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from torch import nn

import diag
from diag.reporting.machines.checking import with_settings
from diag.reporting.machines.policy import read_policy
from diag.reporting.machines.schema import schema
from diag.run.reading import read_run

ROOT = Path(diag.__file__).parent.parent
VALIDATOR = jsonschema.Draft202012Validator(schema())


def document(result, format_):
    """The one document on standard output, after it was validated."""
    made = json.loads(result.stdout, parse_constant=pytest.fail)
    VALIDATOR.validate(made)
    assert made["format"] == format_
    return made


def test_the_published_schema_is_the_package_s_own():
    jsonschema.Draft202012Validator.check_schema(schema())
    assert json.loads((ROOT / "docs" / "diag.schema.json").read_text()) == schema()


def test_the_schema_refuses_what_is_not_a_document(run_diag, make_run):
    made = document(run_diag("show", make_run("run", 1.0), "--json"), "diag-findings")
    for wrong in ({**made, "format_version": 2}, {**made, "level": "terrible"}, {"format": "diag-findings"}):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(wrong)


def test_show_and_report_say_the_same(run_diag, make_run, tmp_path):
    folder = make_run("run", 1000.0)
    shown = document(run_diag("show", folder, "--json"), "diag-findings")
    reported = document(run_diag("report", folder, "--json"), "diag-findings")
    assert reported.pop("report") == str(tmp_path / "report.html") and reported == shown
    assert shown["level"] == "alarm" and shown["counts"]["alarm"] == 1
    worst = shown["findings"][0]
    assert worst["instrument"] == "softmax_collapse" and worst["last_step"] == 100 and not worst["old"]
    assert worst["values"]["collapsed"] == 1.0
    assert shown["stories"][0] == {"level": "alarm", "finding": "softmax_collapse", "consequences": []}
    assert shown["run"]["values"]["loss"] == pytest.approx(torch.tensor(-99 / 50.0).exp().item())
    skipped = next(row for row in shown["unjudged"] if row["instrument"] == "neural_collapse")
    assert skipped["kind"] == "skipped" and skipped["times"] == 2


def test_a_verdict_from_the_first_half_of_a_run_is_old(run_diag, make_run):
    shown = document(run_diag("show", make_run("run", 1000.0, steps=(10, 50)), "--json"), "diag-findings")
    assert shown["findings"][0]["old"]


def test_numbers_of_one_check_by_step(run_diag, make_run):
    made = document(
        run_diag("show", make_run("run", 1000.0), "--instrument", "softmax_collapse", "--json"), "diag-series"
    )
    assert made["steps"] == [50, 100] and made["values"]["collapsed"] == [1.0, 1.0]


def test_compare_has_a_document(run_diag, make_run, tmp_path):
    names = [make_run(n, margin) for n, margin in (("a", 1000.0), ("b", 1.0), ("h1", 1.0), ("h2", 1.0))]
    healthy = ("--healthy", names[2], "--healthy", names[3])
    made = document(run_diag("compare", *names[:2], *healthy, "-o", "c.html", "--json"), "diag-compare")
    assert made["output"] == str(tmp_path / "c.html") and made["healthy"] == ["Run h1", "Run h2"]
    check = next(row for row in made["checks"] if row["instrument"] == "softmax_collapse")
    assert check["levels"] == ["alarm", "ok"] and check["change"] == "better"
    assert next(r for r in made["scalars"] if r["name"] == "collapsed")["outside"] == ["A"]
    swept = run_diag("compare", *names, columns=160)
    assert [line.split()[1] for line in swept.stdout.splitlines() if line[1:2] == ":"] == ["a", "b", "h1", "h2"]
    document(run_diag("compare", *names, "--json"), "diag-compare")


def test_checkpoints_are_measured_and_compared(run_diag, tmp_path):
    (tmp_path / "job.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    x = torch.linspace(-1, 1, 40).reshape(20, 2)\n"
        "    return nn.Linear(2, 2), nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long())\n"
    )
    for name, factor in (("a.pt", 1.0), ("b.pt", 3.0)):
        torch.save({"weight": factor * torch.eye(2), "bias": torch.zeros(2)}, tmp_path / name)
    made = document(run_diag("compare", "a.pt", "b.pt", "--build", "job.py:build", "--json"), "diag-compare")
    assert len(made["runs"]) == 2 and any(row["difference"] for row in made["scalars"])


def test_a_log_becomes_a_run(run_diag, tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{i},{1 / i}\n" for i in range(1, 60)))
    made = document(run_diag("import", "log.csv", "--json"), "diag-findings")
    assert made["run"]["last_step"] == 59 and (tmp_path / "diag-run" / "run.json").exists()
    assert "Run: " in run_diag("import", "log.csv", "-o", "other").stdout
    assert run_diag("check", "other").exit_code == 0
    nothing = run_diag("import", "nowhere.csv")
    assert nothing.exit_code == 2 and "There is no nowhere.csv" in nothing.stderr


def test_list_has_a_document(run_diag):
    made = document(run_diag("list", "--json"), "diag-instruments")
    assert {row["name"] for row in made["instruments"]} >= {"softmax_collapse"}


def test_align_and_connect_have_documents(run_diag, tmp_path):
    (tmp_path / "task.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(20, 4)\n"
        "    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), nn.CrossEntropyLoss(), "
        "(x, (x[:, 0] > 0).long())\n"
    )
    for name, seed in (("a.pt", 1), ("b.pt", 2)):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).state_dict(), tmp_path / name)
    build = ("--build", "task.py:build", "--points", "3", "--json")
    aligned = document(run_diag("align", "a.pt", "b.pt", *build), "diag-alignment")
    assert len(aligned["result"]["line"]["losses"]) == len(aligned["result"]["line"]["alphas"]) >= 3
    connected = document(run_diag("connect", "a.pt", "b.pt", *build), "diag-connections")
    assert connected["result"]["names"] == ["a.pt", "b.pt"]


def test_check_has_a_document_and_its_exit_code(run_diag, make_run):
    bad = run_diag("check", make_run("bad", 1000.0), "--json")
    made = document(bad, "diag-check")
    assert bad.exit_code == made["exit_code"] == 1 and not made["passed"]
    assert [row["instrument"] for row in made["checks"] if row["outcome"] == "failed"] == ["softmax_collapse"]
    good = run_diag("check", make_run("good", 1.0), "--json")
    assert good.exit_code == document(good, "diag-check")["exit_code"] == 0


def test_with_a_baseline_only_what_is_worse_fails(run_diag, make_run):
    before, now, clean = make_run("before", 1000.0), make_run("now", 1000.0), make_run("clean", 1.0)
    known = run_diag("check", now, "--baseline", before)
    assert known.exit_code == 0 and "As in the baseline: softmax_collapse" in known.stdout
    assert run_diag("check", now, "--baseline", clean).exit_code == 1
    assert run_diag("check", now, "--baseline", clean, "--baseline", before).exit_code == 0
    made = document(run_diag("check", now, "--baseline", before, "--json"), "diag-check")
    assert made["baseline"] == ["before"]
    assert {row["instrument"]: row["outcome"] for row in made["checks"]}["softmax_collapse"] == "known"


def test_the_last_healthy_runs_are_a_baseline(run_diag, make_run):
    for name, margin in (("r1", 1.0), ("r2", 1000.0), ("r3", 1.0), ("now", 1000.0)):
        make_run(name, margin)
    made = document(run_diag("check", "now", "--last", "2", "--json"), "diag-check")
    assert made["baseline"] == ["r1", "r3"] and made["exit_code"] == 1
    few = run_diag("check", "now", "--last", "3")
    assert few.exit_code == 2 and "2 of the 3 earlier runs beside" in few.stderr


def test_levels_and_limits_of_pyproject(run_diag, make_run, tmp_path):
    make_run("run", 1000.0)
    configuration = tmp_path / "pyproject.toml"
    configuration.write_text('[tool.diag.check]\nlevels = { softmax_collapse = "warning" }\n')
    assert run_diag("check", "run").exit_code == 0
    assert run_diag("check", "run", "--fail-on", "warning").exit_code == 1
    configuration.write_text('[tool.diag.check]\nlevels = { softmax_collapse = "ignore" }\nfail-on = "warning"\n')
    ignored = run_diag("check", "run")
    assert ignored.exit_code == 0 and "Ignored: softmax_collapse" in ignored.stdout
    other = tmp_path / "limits.toml"
    other.write_text('[check.limits]\n"softmax_collapse.collapsed" = { max = 0.5 }\nloss = { min = 0.0 }\n')
    broken = run_diag("check", "run", "--config", other)
    assert broken.exit_code == 1
    assert "Broken limit: softmax_collapse.collapsed is 1; the limit is at most 0.5." in broken.stdout
    made = document(run_diag("check", "run", "--config", other, "--json"), "diag-check")
    assert {row["name"]: row["outcome"] for row in made["limits"]} == {
        "softmax_collapse.collapsed": "failed",
        "loss": "passed",
    }


def test_settings_of_checks_of_the_record(make_run, tmp_path):
    (tmp_path / "c.toml").write_text("[settings.gradient_flow]\ndepth_factor = 7\n")
    run = with_settings(read_run(make_run("run", 1.0)), read_policy(tmp_path / "c.toml").settings)
    (_, result), *_ = run.series("gradient_flow")
    assert result.provenance.settings["depth_factor"] == 7.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[check]\nfail_on = 'alarm'",
            "has an unknown key in [check], 'fail_on'; expected one of fail-on, ",
        ),
        ("[check]\nfail-on = 'ok'", "fail-on is 'ok'; expected alarm, warning."),
        ("[check.levels]\nsoftmax_colapse = 'warning'", "There is no instrument 'softmax_colapse'; did you mean"),
        ("[check.levels]\nsoftmax_collapse = 'off'", "softmax_collapse is 'off'; expected alarm, warning, ignore."),
        ("[check.limits]\nloss = 3", "the limit on loss is 3; expected { min = ..., max = ... }."),
        ("[check.limits]\nloss = { max = 'x' }", "max of the limit on loss is 'x'; expected a number."),
        ("[check.limits]\n'logged.acc' = { max = 1 }", "limit on logged.acc, which the run did not record; it has"),
        ("[settings.softmax_collapse]\nalarm_at = 1", "softmax_collapse measures during the training"),
        ("[settings.gradient_flow]\nx = 1", "gradient_flow has no setting 'x'; it has"),
        ("[settings.gradient_flow]\ndepth_factor = 'x'", "gradient_flow.depth_factor takes a number"),
        ("[chek]", "has an unknown table, 'chek'; expected one of check, settings."),
        ("[check", "is not valid TOML ("),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(text, said, run_diag, make_run, tmp_path):
    make_run("run", 1.0)
    (tmp_path / "c.toml").write_text(text)
    result = run_diag("check", "run", "--config", "c.toml")
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_junit_has_a_case_each_verdict(run_diag, make_run, tmp_path):
    run_diag("check", make_run("bad", 1000.0), "--junit", "out/junit.xml")
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    cases = {case.get("name"): case for case in suite}
    assert suite.get("failures") == "1" and int(suite.get("tests")) == len(cases)
    assert cases["softmax_collapse"][0].tag == "failure" and "Try: " in cases["softmax_collapse"][0].text
    unjudged = [case[0].attrib for case in suite if case[0].tag == "skipped"]
    assert unjudged and {a["type"] for a in unjudged} == {"no verdict"}
    assert not any(a["message"].startswith("no verdict") for a in unjudged)


def test_sarif_has_a_result_each_finding(run_diag, make_run, tmp_path):
    before = make_run("before", 1000.0)
    run_diag("check", make_run("bad", 1000.0), "--sarif", "a.sarif")
    made = json.loads((tmp_path / "a.sarif").read_text())
    assert made["version"] == "2.1.0"
    (result,) = made["runs"][0]["results"]
    assert result["ruleId"] == "softmax_collapse" and result["level"] == "error"
    assert [rule["id"] for rule in made["runs"][0]["tool"]["driver"]["rules"]] == ["softmax_collapse"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith("bad/run.json")
    run_diag("check", "bad", "--baseline", before, "--sarif", "b.sarif")
    suppressed = json.loads((tmp_path / "b.sarif").read_text())["runs"][0]["results"][0]["suppressions"]
    assert suppressed == [{"kind": "external", "justification": "in the baseline"}]


def test_github_gets_one_line_a_finding(run_diag, make_run, monkeypatch):
    folder = make_run("bad", 1000.0)
    assert "::error" not in run_diag("check", folder).stdout
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    lines = [line for line in run_diag("check", folder).stdout.splitlines() if line.startswith("::")]
    assert len(lines) == 1 and re.match(r"::error title=diag%3A Softmax collapse::\S", lines[0])
    assert "::error" not in run_diag("check", folder, "--no-github").stdout
