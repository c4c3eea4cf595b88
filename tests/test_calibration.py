"""The calibration: its lists, its arithmetic on rows written by hand, and a short cut of it from the door."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from calibration import runner, tables  # noqa: E402
from calibration.kinds import faults, healthy_kinds  # noqa: E402
from calibration.main import main  # noqa: E402
from calibration.program import Program, change  # noqa: E402
from calibration.programs import programs  # noqa: E402
from calibration.runner import Results  # noqa: E402
from calibration.scores import by_check, judge, score, shown_at, worse  # noqa: E402
from calibration.split import side_of, split  # noqa: E402
from calibration.suite import Case, cases, matching, short_cases  # noqa: E402

from diag.instruments.causes import Cause  # noqa: E402

FLAT, FALLING = [2.0] * 10, [2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]


def finding(check, cause="", level="alarm", told=5):
    return {"check": check, "cause": cause, "level": level, "told": told, "sentence": f"{check} says so."}


def row(kind, *findings, losses=FALLING, metrics=(0.9,), onset=1, **more):
    made = {"kind": kind, "program": "mlp", "seed": 0, "fault": kind in faults(), "steps": 10, "wall": 2.0}
    return made | {"findings": list(findings), "losses": losses, "block": 1, "metrics": list(metrics),
                   "onset": onset, "watching": 0.1, "closing": 0.01} | more  # fmt: skip


# The lists


def test_every_program_is_on_one_side_and_both_sides_are_mixed():
    sides = split()
    assert sorted([*sides["choose"], *sides["score"]]) == sorted(programs())
    assert abs(len(sides["choose"]) - len(sides["score"])) <= 2
    with pytest.raises(KeyError, match=r"no side of split\.json"):
        side_of("nonsense")


def test_the_suite_is_as_wide_as_it_says():
    found, silent = faults(), [f for f in faults().values() if f.silent]
    assert len(programs()) >= 14 and len({p.family for p in programs().values()}) >= 10
    assert len(found) >= 45 and len(silent) >= 30 and {f.theme for f in found.values()} >= {
        "loop", "loss", "data", "optimization", "network", "outcome", "numerics", "distributed"
    }  # fmt: skip
    every = cases()
    sound = [c for c in every if not c.fault]
    assert len(healthy_kinds()) >= 30 and len(sound) >= 100
    assert {c.kind for c in every} == set(found) | set(healthy_kinds())
    assert len({c.name for c in every}) == len(every)
    assert set(short_cases()) and all(c.what.fits(programs()[c.program]) for c in [*every, *short_cases()])


def test_every_fault_names_causes_and_says_in_a_sentence_what_was_done():
    for f in faults().values():
        assert f.names and f.names.isdisjoint(f.follows) and f.names | f.follows <= set(Cause)
        assert f.text.endswith(".") or f.text.endswith(")."), f.name
    assert all(k.text.endswith(".") for k in healthy_kinds().values())


def test_cases_are_found_by_kind_program_and_name():
    every = cases()
    assert {c.program for c in matching(every, "mlp", None)} == {"mlp"}
    assert {c.kind for c in matching(every, "units_dead", None)} == {"units_dead"}
    assert [c.name for c in matching(every, "plain/gpt/1", None)] == ["plain/gpt/1"]
    assert {c.side for c in matching(every, None, "score")} == {"score"}


# Programs and faults do what they say


def built(name, kind=None):
    program = programs()[name](0)
    if kind is not None:
        faults()[kind].apply(program)
    program.build()
    return program


def test_a_program_is_the_same_each_time():
    first, second = built("regression_friedman"), built("regression_friedman")
    for program in (first, second):
        program.epochs = 1
        program.train()
    assert first.losses == second.losses and first.metrics == second.metrics
    assert len(first.losses) == first.total_steps == 24


def test_a_change_reaches_the_method_as_it_was():
    program = Program()
    change(program, "divided", lambda old, loss: old(loss) + 1)
    change(program, "divided", lambda old, loss: 2 * old(loss))
    assert program.divided(torch.tensor(3.0)) == 8.0


def test_faults_change_what_they_name():
    program = built("mlp", "head_in_no_optimizer")
    held = {id(q) for group in program.optimizer.param_groups for q in group["params"]}
    missing = [n for n, q in program.model.named_parameters() if id(q) not in held]
    assert missing == ["7.weight", "7.bias"]

    program = built("mlp", "labels_shuffled")
    whole = built("mlp")
    assert torch.equal(program.train_set.tensors[0], whole.train_set.tensors[0])
    labels, right = program.train_set.tensors[1], whole.train_set.tensors[1]
    assert torch.equal(labels.bincount(), right.bincount()) and (labels == right).float().mean() < 0.2

    program = built("mlp", "gradients_never_zeroed")
    program.epochs = 1
    program.train()
    assert program.losses != whole.losses


def test_a_resumed_training_goes_on_as_if_nothing_had_happened():
    program = programs()["lora"](0)
    healthy_kinds()["resumed_well"].apply(program)
    program.build()
    for life in program.lives():
        life()
    whole = built("lora")
    whole.train()
    assert program.number == whole.number == len(program.losses)
    assert program.losses[:140] == whole.losses[:140]


# Scores, on rows written by hand


def test_a_right_cause_counts_as_named_and_as_first_by_the_order_of_stories():
    control = row("plain")
    later = [finding("divergence", "training_diverged"), finding("zeroing", "gradients_not_zeroed", told=12)]
    told = judge(row("gradients_never_zeroed", *later, losses=FLAT, onset=2), control)
    assert told.counted and told.detected and told.named and not told.first and not told.false
    assert told.steps == 11 and told.shown == 1  # the loss is off by half of the gain from step 2 on
    first = judge(row("gradients_never_zeroed", *later[::-1], losses=FLAT), control)
    assert first.first


def test_what_the_whole_program_draws_too_is_no_detection():
    known = finding("zeroing", "gradients_not_zeroed")
    told = judge(row("gradients_never_zeroed", known, losses=FLAT), row("plain", known))
    assert told.counted and not told.detected and not told.named


def test_another_cause_is_a_false_statement_and_one_without_a_cause_is_none():
    told = judge(row("units_dead", finding("data", "labels_shuffled"), finding("old")), row("plain", metrics=[2.0]))
    assert [f["cause"] for f in told.false] == ["labels_shuffled"] and not told.detected
    assert [f["check"] for f in told.unsaid] == ["old"]


def test_a_check_that_passes_a_loss_that_left_is_false():
    passed = finding("divergence", level="ok", told=None)
    told = judge(row("learning_rate_high", passed, losses=[1.0, *[9.0] * 9]), row("plain"))
    assert told.false == [passed]
    assert not judge(row("learning_rate_high", passed, losses=FLAT), row("plain")).false


def test_a_fault_without_harm_or_that_cannot_be_seen_does_not_count():
    assert judge(row("learning_rate_low"), row("plain")).why_not == "it did this program no harm"
    assert judge(row("copy_evaluated"), row("plain")).why_not.startswith("the model that is evaluated")
    assert judge(row("head_in_no_optimizer"), row("plain")).counted  # silent: the loss need not show it


def test_the_step_at_which_the_loss_shows_it_lasts():
    spike = [*FALLING[:3], 2.0, *FALLING[4:]]
    assert shown_at(row("units_dead", losses=spike), row("plain")) is None
    assert shown_at(row("units_dead", losses=FLAT), row("plain")) == 2
    assert shown_at(row("units_dead", losses=[1.9, "nan", "nan"]), row("plain")) == 2
    assert shown_at(row("units_dead", losses=FLAT[:5], block=2), row("plain")) == 4


def test_a_metric_that_is_not_a_number_is_worse():
    assert worse(row("units_dead", metrics=["nan"]), row("plain"))
    assert worse(row("units_dead", metrics=[0.5]), row("plain"))
    assert not worse(row("units_dead", metrics=[0.89]), row("plain"))


def test_what_was_said_of_healthy_runs_counts_even_when_it_was_withdrawn():
    early, again = (finding("flow", "graph_cut", "warning", told=step) for step in (1, 3))
    spoken = row("plain", spoken=[early, again])
    quiet = row("label_smoothing")
    found = score([spoken, quiet, row("mixup", finding("flow", "graph_cut", "warning"))])
    assert [a.finding["told"] for a in found.alarms] == [1, 5]
    assert found.false_alarms("warning") == 2 and found.false_alarms("alarm") == 0
    assert found.healthy_steps == 30


def test_what_was_said_and_withdrawn_of_a_faulty_run_is_judged_too():
    wrong, right = finding("flow", "labels_shuffled"), finding("flow", "gradients_not_zeroed")
    told = judge(row("gradients_never_zeroed", right, spoken=[wrong, right]), row("plain"))
    assert told.first and [f["cause"] for f in told.false] == ["labels_shuffled"]


def test_a_check_is_scored_on_the_faults_that_it_names():
    rows = [
        row("plain"),
        row("units_dead", finding("units", "units_dead", told=4), losses=FLAT),
        row("output_behind_relu", losses=FLAT),
        row("softmax_twice", finding("loss", "double_softmax"), losses=FLAT),
        row("mixup", finding("units", "units_dead", "warning")),
    ]
    units = next(c for c in by_check(score(rows)) if c.check == "units")
    assert {j.fault.name for j in units.targets} == {"units_dead", "output_behind_relu"}
    assert units.named == units.detected == units.first == 0.5
    assert units.steps == 4 and units.false == 0 and len(units.alarms) == 1
    shown = tables.checks(score(rows))
    assert ["units", "2", "50 %", "50 %", "50 %", "4", "0", "0", "1", "50.00"] in shown
    assert "output_behind_relu on mlp" in tables.misses(score(rows))
    page = tables.page({"choose": score(rows), "score": score(rows)}, {"diag": "1", "torch": "2", "python": "3"})
    assert "| units | 2 | 50 % |" in page and "healthy mixup on mlp/0: [warning] units (units_dead)" in page


# Rows on disk, and the door


def test_rows_are_kept_replaced_and_read_past_a_torn_line(tmp_path):
    kept, case = Results(tmp_path / "rows"), Case("plain", "mlp", 0)
    assert kept.rows("choose") == []
    kept.add("choose", {"kind": "plain", "program": "mlp", "seed": 0, "value": 1})
    kept.add("choose", {"kind": "plain", "program": "mlp", "seed": 0, "value": 2})
    with (tmp_path / "rows" / "choose.jsonl").open("a") as file:
        file.write('{"kind": "plain", "pro')
    assert [r["value"] for r in kept.rows("choose")] == [2]
    kept.forget([case])
    assert kept.rows("choose") == []


def test_a_run_that_hangs_or_dies_is_a_row_too(monkeypatch):
    import os
    import time

    monkeypatch.setattr(runner, "warm", lambda: None)
    rows = []
    monkeypatch.setattr(runner, "observe", lambda case: time.sleep(60))
    runner.run_all([Case("plain", "mlp", 0)], 1, lambda case, row: rows.append(row), deadline=0.2)
    monkeypatch.setattr(runner, "observe", lambda case: os._exit(3))
    runner.run_all([Case("plain", "mlp", 0)], 1, lambda case, row: rows.append(row))
    assert [r["error"] for r in rows] == ["It ran past its deadline.", "Its process ended without a row."]


def test_the_short_cut_runs_and_resumes(tmp_path, monkeypatch):
    """In four epochs: that each case ends in a row does not depend on how long it trains."""
    for name in {case.program for case in short_cases()}:
        monkeypatch.setattr(programs()[name], "epochs", 4)
    done = CliRunner().invoke(main, ["--short", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) == len(short_cases()) and not [r for r in rows if "error" in r]
    assert all(r["steps"] > 0 and r["losses"] and r["versions"]["torch"] for r in rows)
    assert "Kinds of fault" in done.output and "learning_rate_high" in done.output and "/mlp/0 " in done.output
    again = CliRunner().invoke(main, ["--short", "--results", str(tmp_path), "--resume"])
    assert again.exit_code == 0 and "Kinds of fault" in again.output and "/mlp/0 " not in again.output


def test_the_script_is_the_door():
    door = [sys.executable, ROOT / "scripts" / "calibrate", "--only"]
    one = subprocess.run([*door, "units_dead/mlp/0", "--list"], capture_output=True, text=True)
    assert one.returncode == 0 and one.stdout.split()[-1] == "units_dead/mlp/0", one.stderr
    wrong = CliRunner().invoke(main, ["--only", "nonsense"])
    assert wrong.exit_code == 2 and "No case matches 'nonsense'; --list names them all." in wrong.output


def test_published_rows_are_read_and_later_ones_replace_them(tmp_path):
    kept = Results(tmp_path)
    kept.add("choose", {"kind": "plain", "program": "mlp", "seed": 0, "steps": 1})
    kept.pack(tmp_path)
    packed = (tmp_path / "choose.jsonl.gz").read_bytes()
    (tmp_path / "choose.jsonl").unlink()
    assert kept.rows("choose")[0]["steps"] == 1
    kept.add("choose", {"kind": "plain", "program": "mlp", "seed": 0, "steps": 2})
    assert [r["steps"] for r in kept.rows("choose")] == [2]
    (tmp_path / "choose.jsonl").unlink()
    kept.pack(tmp_path)
    assert (tmp_path / "choose.jsonl.gz").read_bytes() == packed  # no time of writing in it
