"""Facts of checkpoint files by themselves, against files whose contents are planted."""

import copy
import json
import math

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import diag
from diag.cli import main
from diag.errors import CheckpointError, InvalidInput
from diag.instruments.saved.rows import zero_and_repeated
from diag.reporting.machines.schema import schema
from diag.run.state_files import from_state_files
from diag.snapshot.external.saved import Saved
from tests.checkpoints import hostile

LEVELS = {"saved_finite", "saved_rows", "saved_weights", "saved_changes", "saved_ties", "saved_optimizer"}


class Tied(nn.Module):
    """An embedding whose weight is also the output's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def optimizer(model):
    made = torch.optim.Adam(model.parameters(), lr=0.01)
    model.head(model.middle(model.embedding(torch.arange(12)))).square().sum().backward()
    made.step()
    return made


@pytest.fixture
def saved(tmp_path):
    def save(step, **contents):
        path = tmp_path / f"step{step}.pt"
        torch.save(contents, path)
        return path

    return save


def levels(run):
    return {f.instrument: str(f.verdict.level) for f in run.findings()}


def said(run, name):
    return next(f.verdict.sentence for f in run.findings() if f.instrument == name)


def test_a_sound_pair_of_files_is_left_in_peace(saved, model, optimizer):
    first = saved(1, model=model.state_dict(), optimizer=optimizer.state_dict())
    model.head.weight.grad.add_(1)
    optimizer.step()
    second = saved(2, model=model.state_dict(), optimizer=optimizer.state_dict())
    run = from_state_files([second, first])
    found = levels(run)
    assert set(found) == LEVELS and not set(found.values()) & {"warning", "alarm"}
    assert found["saved_finite"] == found["saved_rows"] == found["saved_optimizer"] == found["saved_ties"] == "ok"
    assert "Since step1.pt the weights moved by" in said(run, "saved_changes")
    assert said(run, "saved_ties") == "Weights are tied, and no tie broke: embedding.weight and head.weight."
    assert not run.outcomes and run.last_step == 2
    assert all(record.seconds is not None and record.seconds >= 0 for record in run.records)


def test_what_is_not_finite_is_counted_and_a_mask_is_not(saved, model):
    state = model.state_dict() | {"mask": torch.full((4, 4), -math.inf).triu(1)}
    assert levels(from_state_files([saved(1, model=state)]))["saved_finite"] == "ok"
    state["middle.weight"] = state["middle.weight"].clone()
    state["middle.weight"][0, :3] = math.nan
    run = from_state_files([saved(2, model=state)])
    assert levels(run)["saved_finite"] == "alarm"
    assert "3 entries in 1 of 5 weights (middle.weight)" in said(run, "saved_finite")


def test_an_optimizer_whose_moments_are_not_finite_is_an_alarm(saved, model, optimizer):
    optimizer.state[model.middle.bias]["exp_avg"][0] = math.inf
    run = from_state_files([saved(1, model=model.state_dict(), optimizer=optimizer.state_dict())])
    assert "1 entries of the optimizer's state" in said(run, "saved_finite")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_counted_as_a_comparison_of_all_pairs_counts_them(dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-1, 2, (300, 5), generator=generator).to(dtype)
    rows[7] = -0.0
    rows[8, 0] = math.nan
    rows[9] = rows[8]
    zero = [i for i in range(300) if (rows[i] == 0).all()]
    repeated = [i for i in range(300) if i not in zero and any(bool((rows[i] == rows[j]).all()) for j in range(i))]
    assert zero_and_repeated(rows) == (len(zero), len(repeated))


def test_single_rows_are_told_and_copies_throughout_are_a_warning(saved, model):
    state = copy.deepcopy(model.state_dict())
    state["middle.weight"][3] = 0
    state["middle.weight"][5] = state["middle.weight"][4]
    run = from_state_files([saved(1, model=state)])
    assert levels(run)["saved_rows"] == "description"
    assert "1 are zero throughout (in middle.weight)" in said(run, "saved_rows")
    assert "1 are the same as another (in middle.weight)" in said(run, "saved_rows")
    for name in ("embedding.weight", "middle.weight"):
        state[name] = torch.ones_like(state[name])
    run = from_state_files([saved(2, model=state)])
    assert levels(run)["saved_rows"] == "warning" and "2 of 3 weights" in said(run, "saved_rows")


def test_sizes_and_formats():
    state = {f"layers.{i}.weight": torch.full((4, 4), 2.0 + i) for i in range(3)}
    state["layers.1.weight"] = state["layers.1.weight"].to(torch.bfloat16)
    result = diag.saved_weights(saved=Saved("a", state))
    assert result.sizes == {"layers.0.weight": 2.0, "layers.1.weight": 3.0, "layers.2.weight": 4.0}
    assert result.norm == pytest.approx(4 * math.sqrt(4 + 9 + 16), rel=1e-12)
    assert result.formats == {"float32": pytest.approx(2 / 3), "bfloat16": pytest.approx(1 / 3)}
    assert result.uneven == ("layers.1.weight",) and str(result.verdict().level) == "description"


def test_what_changed_is_the_norm_of_the_difference(saved):
    before = {"a": torch.full((2, 2), 1.0), "b": torch.ones(3), "gone": torch.ones(1), "c": torch.ones(2)}
    after = {"a": torch.full((2, 2), 1.5), "b": torch.ones(3), "new": torch.ones(1), "c": torch.ones(3)}
    run = from_state_files([saved(1, model=before), saved(2, model=after)])
    result = run.series("saved_changes")[-1][1]
    assert result.changes == {"a": 0.5, "b": 0.0} and result.unchanged == ("b",)
    assert result.change == pytest.approx(1.0 / math.sqrt(7), rel=1e-12)  # |a' - a| = 1, |(a, b)|^2 = 4 + 3
    assert (result.added, result.removed, result.reshaped) == (("new",), ("gone",), ("c",))
    assert said(run, "saved_changes").endswith(
        "1 of 2 did not change: b. New: new. Gone: gone. Of another shape: c."
    )


def test_two_equal_files_are_a_warning(saved, model):
    run = from_state_files([saved(1, model=model.state_dict()), saved(2, model=model.state_dict())])
    assert levels(run)["saved_changes"] == "warning" and "Nothing changed since step1.pt" in said(
        run, "saved_changes"
    )


def test_a_tie_that_broke_is_found_and_a_copy_is_no_tie(saved, model):
    first = saved(1, model=model.state_dict())
    model.head.weight = nn.Parameter(model.head.weight.detach() + 0.1)
    run = from_state_files([first, saved(2, model=model.state_dict())])
    assert levels(run)["saved_ties"] == "warning"
    assert "embedding.weight and head.weight" in said(run, "saved_ties")
    online = {"online": torch.ones(4, 4), "target": torch.ones(4, 4)}
    later = {"online": torch.zeros(4, 4), "target": torch.ones(4, 4)}
    assert (
        levels(from_state_files([saved(3, model=online), saved(4, model=later)]))["saved_ties"] == "not_applicable"
    )


def test_an_optimizer_of_another_network_is_found(saved, model, optimizer):
    other = nn.Linear(5, 7)
    wrong = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(torch.ones(2, 5)).sum().backward()
    wrong.step()
    run = from_state_files([saved(1, model=model.state_dict(), optimizer=wrong.state_dict())])
    assert levels(run)["saved_optimizer"] == "warning" and "(7, 5)" in said(run, "saved_optimizer")
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    run = from_state_files([saved(2, model=model.state_dict(), optimizer_states=[state])])  # as Lightning has it
    assert levels(run)["saved_optimizer"] == "alarm" and "no group lists the parameters 2" in said(
        run, "saved_optimizer"
    )
    assert levels(from_state_files([saved(3, model=model.state_dict())]))["saved_optimizer"] == "not_applicable"


def test_the_command_line_and_the_page(saved, model, optimizer, tmp_path):
    model.middle.weight.data[0] = math.nan
    file = saved(1, model=model.state_dict(), optimizer=optimizer.state_dict())
    page = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", str(file), "-o", str(page), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema())
    assert document["level"] == "alarm"
    assert "NaN or infinity: 8 entries in 1 of 4 weights" in page.read_text()
    shown = CliRunner().invoke(main, ["show", str(file)])
    assert shown.exit_code == 0 and "NaN or infinity" in shown.output
    text = tmp_path / "notes.txt"
    text.write_text("no checkpoint")
    refused = CliRunner().invoke(main, ["show", str(text)])
    assert refused.exit_code == 2 and "notes.txt" in refused.output and "Traceback" not in refused.output


@pytest.mark.parametrize("name", sorted(dict(hostile.tensors())))
def test_tensors_that_are_no_plain_numbers_are_left_aside(name, tmp_path):
    (tmp_path / "a.pt").write_bytes(dict(hostile.tensors())[name])
    try:
        run = from_state_files([tmp_path / "a.pt"])
    except CheckpointError as error:
        assert "a.pt" in str(error)
    else:
        assert not run.outcomes or all(isinstance(o, diag.Skipped) for _, o in run.outcomes)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="No checkpoint was given"):
        from_state_files([])
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nowhere\.pt"):
        from_state_files([tmp_path / "nowhere.pt"])
