"""Per-example gradients of a training step from its own backward pass: exact, and the step stays as it was."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import Unsupported
from diag.quantities.batch import as_batch
from diag.quantities.per_example import StepGradients, plan_for_steps
from diag.testing import leaves_no_trace

PATH = Path(__file__).with_name("per_example_cases.py")
cases = importlib.util.module_from_spec(importlib.util.spec_from_file_location("per_example_cases", PATH))
cases.__spec__.loader.exec_module(cases)

NAMES = ["linear over time, LayerNorm", "conv2d, groups, dilation, same", "class and position tokens", "tied head"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_gives_the_gradients_of_its_examples(name):
    model, loss_fn, batch = cases.problem(name)
    truth = cases.loop(model, loss_fn, batch)
    for module in model.modules():
        # The loop would draw other masks.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model.train()
    plan = plan_for_steps(model, loss_fn, batch)
    with StepGradients(model, plan, batch.size) as step:
        loss_fn(batch.forward(model), batch.targets).backward()
    assert float((step.norms() - truth.norm(dim=1)).norm() / truth.norm()) < 1e-10
    assert float((step.gram() - truth @ truth.T).norm() / (truth @ truth.T).norm()) < 1e-10
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(step.mean(), gradient, rtol=1e-10, atol=1e-12)
    result = diag.gradient_coherence(per_example_gradients=step)
    expected = float(truth.mean(0).square().sum() / truth.square().sum(1).mean())
    assert result.coherence == pytest.approx(expected, rel=1e-10)


def trained(watched):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(cases.D, 16), nn.Dropout(0.3), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, cases.CLASSES)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(40, cases.D), torch.randint(cases.CLASSES, (40,))
    plan = plan_for_steps(model, F.cross_entropy, as_batch((x[:8], y[:8]))) if watched else None
    for rows in torch.arange(40).split(8) * 3:
        optimizer.zero_grad()
        if watched:
            with StepGradients(model, plan, len(rows)) as step:
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            assert step.norms().shape == (8,)
        else:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return [*(p.detach() for p in model.parameters()), torch.rand(3)]


def test_training_is_bit_identical():
    for seen, unseen in zip(trained(True), trained(False), strict=True):
        assert torch.equal(seen, unseen)


def test_making_the_plan_leaves_no_trace():
    model = nn.Sequential(nn.Linear(cases.D, 8), nn.Dropout(0.5), nn.Linear(8, cases.CLASSES)).train()
    batch = as_batch((cases.flat(), torch.randint(cases.CLASSES, (cases.N,))))
    with leaves_no_trace(model):
        plan_for_steps(model, F.cross_entropy, batch)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Bilinear(8, 8, 8)])
def test_steps_that_cannot_be_read(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.out = (
                nn.Linear(cases.D, 8),
                copy.deepcopy(layer),
                nn.Linear(8, cases.CLASSES),
            )

        def forward(self, x):
            x = self.first(x)
            return self.out(self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x))

    batch = as_batch((cases.flat(), torch.randint(cases.CLASSES, (cases.N,))))
    with pytest.raises(Unsupported, match="cannot be told apart by example"):
        plan_for_steps(Model(), F.cross_entropy, batch)


def test_half_a_step_is_none():
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    plan = plan_for_steps(model, loss_fn, batch)
    with StepGradients(model, plan, batch.size) as step:
        loss_fn(batch.forward(model), batch.targets)
    with pytest.raises(Unsupported, match="No whole training step"):
        step.norms()
    with pytest.raises(ValueError, match="the user's own"), StepGradients(model, plan, batch.size) as step:
        raise ValueError("the user's own")
    with pytest.raises(Unsupported, match="No whole training step"):
        step.norms()
