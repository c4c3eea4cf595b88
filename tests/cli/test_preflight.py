"""`diag preflight`: exit status, what is printed, the page."""

import json
import textwrap

import jsonschema
import pytest

from diag.reporting.machines.schema import schema

TASK = """
    import torch
    from torch import nn

    def build(rate=0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        data = [(torch.randn(32, 6), torch.arange(32) % 3)]
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        return {"model": model, "loss_fn": nn.CrossEntropyLoss(), "data": data, "optimizer": optimizer}

    def slow():
        return build(1e-8)

    def no_loss():
        return {**build(), "loss_fn": None}
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))
    return lambda name: f"{tmp_path / 'task.py'}:{name}"


def test_sound(run_diag, task, tmp_path):
    found = run_diag("preflight", "--build", task("build"), "-o", "page.html", "--seconds", 20)
    assert found.exit_code == 0, found.output
    assert "One batch" in " ".join(found.output.split())  # a list of names is wrapped where the line ends
    assert "preflight of Sequential" in (tmp_path / "page.html").read_text()


def test_broken(run_diag, task):
    found = run_diag("preflight", "--build", task("slow"), "--steps", 60, "--seconds", 20, "--json")
    assert found.exit_code == 1, found.output
    made = json.loads(found.stdout)
    jsonschema.validate(made, schema())
    assert made["level"] == "alarm" and made["run"]["last_step"] > 0
    assert any(f["cause"] == "learning_rate_too_low" for f in made["findings"])


@pytest.mark.parametrize(("name", "words"), [("no_loss", "has no loss"), ("nothing", "has no function 'nothing'")])
def test_a_mistake_is_one_sentence(run_diag, task, name, words):
    found = run_diag("preflight", "--build", task(name))
    assert found.exit_code == 2
    assert words in " ".join(found.output.split())
    assert "Traceback" not in found.output
