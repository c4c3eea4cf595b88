"""Per-example gradients of a training step from its own backward pass: exact, and the step stays as it was."""

import copy
import gc
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import diag
from diag.errors import Unsupported
from diag.gradients import (
    Gram,
    GroupGram,
    ModelGradients,
    SquaredNorms,
    StepGradients,
    plan_for_steps,
)
from diag.gradients.dry_run import queries_of
from diag.snapshot.reading.forms import as_batch
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


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_beforehand_is_answered_on_the_way(name):
    """The same numbers as from a snapshot, several questions at once, and no activation is kept."""
    model, loss_fn, batch = cases.problem(name)
    model.eval()
    groups = ((0, 1, 2), (3, 1))
    queries = [SquaredNorms(), Gram(), GroupGram(groups)]
    expected = ModelGradients(model, loss_fn, [batch]).ask(*queries)
    plan = plan_for_steps(model, loss_fn, batch)
    with StepGradients(model, plan, batch.size, ask=queries) as step:
        loss_fn(batch.forward(model), batch.targets).backward()
    for found, truth in zip(step.ask(*queries), expected, strict=True):
        assert found.keys() == truth.keys()
        for layer in found:  # the same arithmetic, but for the factor 1/n of the loss
            scale = truth[layer].abs().max()
            torch.testing.assert_close(found[layer], truth[layer].to(found[layer]), rtol=1e-10, atol=1e-12 * scale)
    assert step.norms().tolist() == pytest.approx(sum(expected[0].values()).sqrt().tolist(), rel=1e-10)
    with pytest.raises(Unsupported, match="not among the queries asked before the step"):
        step.mean()


@pytest.mark.parametrize("ask", [[SquaredNorms()], None])
def test_activations_are_let_go(ask):
    """With questions asked beforehand when the backward pass is over, else with the object; no cycle keeps them."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batch = as_batch((torch.randn(8, 6), torch.arange(8) % 4))
    plan = plan_for_steps(model, F.cross_entropy, batch)
    alive = []
    model[1].register_forward_hook(
        lambda module, args, output: alive.append(StorageWeakRef(output.untyped_storage()))
    )
    gc.collect()
    gc.disable()
    try:
        with StepGradients(model, plan, 8, ask=ask) as step:
            F.cross_entropy(model(batch.args[0]), batch.targets).backward()
        held = not alive[-1].expired()
        assert step.norms().shape == (8,)
        del step
        assert held == (ask is None) and alive[-1].expired()
    finally:
        gc.enable()


def test_the_forward_pass_alone_can_be_recorded():
    """What follows it is not looked at, and questions can be told up to the backward pass."""
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    model.eval()
    queries = [GroupGram(((0, 1), (2,))), SquaredNorms()]
    expected = ModelGradients(model, loss_fn, [batch]).ask(*queries)
    step = StepGradients(model, plan_for_steps(model, loss_fn, batch), batch.size)
    with step:
        outputs = batch.forward(model)
        step.end_forward()
        penalty = model.out.bias.square().sum()  # a call of a parameter that is not in the plan
        step.ask_only(queries)
        loss_fn(outputs, batch.targets).backward()
    for found, truth in zip(step.ask(*queries), expected, strict=True):
        for layer in truth:
            torch.testing.assert_close(found[layer], truth[layer], rtol=1e-10, atol=1e-14)
    assert penalty.requires_grad and not step.unplanned
    with pytest.raises(Unsupported, match="not among the queries asked before the step"):
        step.gram()
    assert step.unplanned


def test_an_error_of_the_recording_does_not_reach_the_forward_pass(monkeypatch):
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    model.eval()
    plan = plan_for_steps(model, loss_fn, batch)
    loss_fn(batch.forward(model), batch.targets).backward()
    expected = gradients_of(model)
    model.zero_grad()

    def broken(tensor):
        raise RuntimeError("a stone in the shoe")

    monkeypatch.setattr("diag.gradients.capture.get_gradient_edge", broken)
    with StepGradients(model, plan, batch.size) as step:
        loss_fn(batch.forward(model), batch.targets).backward()
    for found, truth in zip(gradients_of(model), expected, strict=True):
        assert torch.equal(found, truth)
    with pytest.raises(Unsupported, match="No whole training step was seen"):
        step.norms()


def test_a_call_whose_recording_fails_runs_once(monkeypatch):
    """Twice would draw other random numbers, and training would not be bit-identical."""
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    plan = plan_for_steps(model, loss_fn, batch)
    torch.manual_seed(0)
    expected = F.dropout(model.out.weight), torch.get_rng_state()

    def broken(tensor):
        raise RuntimeError("a stone in the shoe")

    monkeypatch.setattr("diag.gradients.capture.get_gradient_edge", broken)
    torch.manual_seed(0)
    with StepGradients(model, plan, batch.size):
        found = F.dropout(model.out.weight), torch.get_rng_state()
    assert all(map(torch.equal, found, expected))


def test_an_error_of_the_model_passes_the_recording():
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    plan = plan_for_steps(model, loss_fn, batch)
    with pytest.raises(RuntimeError, match="shape"), StepGradients(model, plan, batch.size) as step:
        F.linear(torch.ones(2, 3), model.out.weight)
    with pytest.raises(Unsupported, match="the step raised RuntimeError"):
        step.norms()


@pytest.mark.parametrize("name", ["gradient_coherence", "gradient_conflict"])
def test_the_questions_of_an_instrument_are_found_by_a_dry_run(name):
    """With those found in rehearsal asked beforehand, the instrument gives the same as on a step that is kept."""
    model, loss_fn, batch = cases.problem("conv2d, groups, dilation, same")
    model.eval()
    plan = plan_for_steps(model, loss_fn, batch)
    labels = torch.arange(batch.size) % 2
    found = []
    for foresee in (True, False):
        step = StepGradients(model, plan, batch.size)
        if foresee:
            queries = queries_of(lambda g: getattr(diag, name)(per_example_gradients=g, labels=labels), step)
            assert {type(q) for q in queries} == {GroupGram, SquaredNorms}
            step.ask_only(queries)
        with step:
            loss_fn(batch.forward(model), batch.targets).backward()
        found.append(getattr(diag, name)(per_example_gradients=step, labels=labels))
    for field in ("coherence", "standard_error") if name == "gradient_coherence" else ("lowest", "length_kept"):
        # Only the order in which a layer's weight and bias are added up differs.
        assert getattr(found[0], field) == pytest.approx(getattr(found[1], field), rel=1e-12)


def trained(watched, ask=None):
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
            with StepGradients(model, plan, len(rows), ask=ask) as step:
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            assert step.norms().shape == (8,)
        else:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return [*(p.detach() for p in model.parameters()), torch.rand(3)]


@pytest.mark.parametrize("ask", [None, [SquaredNorms(), Gram()]])
def test_training_is_bit_identical(ask):
    for seen, unseen in zip(trained(True, ask), trained(False), strict=True):
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


class Failing(SquaredNorms):
    """A question whose answer cannot be given."""

    def begin(self, gradients):
        return self

    def consume(self, rows, name, block):
        raise MemoryError("no room for the answer")


def gradients_of(model):
    return [p.grad.clone() for p in model.parameters()]


TROUBLE = {
    "no room for the answer": lambda model, loss: loss().backward(),
    "there were several backward passes": lambda model, loss: (
        lambda x: (x.backward(retain_graph=True), x.backward())
    )(loss()),
    "other calls than the plan's": lambda model, loss: (model.out.bias * 1.0, loss().backward()),
    "there was no backward pass": lambda model, loss: loss(),
}


@pytest.mark.parametrize("sentence", TROUBLE)
def test_trouble_stays_with_the_questions(sentence):
    """Whatever goes wrong in reading a step, the step goes on with the gradients that it would have had."""
    model, loss_fn, batch = cases.problem("linear over time, LayerNorm")
    model.eval()
    plan = plan_for_steps(model, loss_fn, batch)
    query = Failing() if "room" in sentence else SquaredNorms()

    def step():
        model.zero_grad()
        TROUBLE[sentence](model, lambda: loss_fn(batch.forward(model), batch.targets))
        return [p.grad for p in model.parameters()]

    expected = step()
    with StepGradients(model, plan, batch.size, ask=[query]) as seen:
        found = step()
    with pytest.raises(Unsupported, match=f"No whole training step was seen.*{sentence}"):
        seen.ask(query)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_step_under_autocast_is_read_in_full_precision():
    """The backward pass inside the region too, where products would else be taken in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    batch = as_batch((torch.randn(6, 20, 64), torch.randn(6, 20, 4)))
    plan = plan_for_steps(model, F.mse_loss, batch)
    norms = []
    for inside in (True, False):
        with StepGradients(model, plan, 6, ask=[SquaredNorms()]) as step:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.mse_loss(model(batch.args[0]), batch.targets)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        norms.append(step.norms())
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(cases.D, 8), nn.LayerNorm(8), nn.Tanh())
        self.out = nn.Linear(8, cases.CLASSES)

    def forward(self, x):
        return self.out(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_checkpointed_layers_let_the_step_pass(backward):
    """What a checkpoint computes again may be read once only: by the step, and not by us."""
    torch.manual_seed(0)
    model = Checkpointed()
    batch = as_batch((cases.flat().float(), torch.randint(cases.CLASSES, (cases.N,))))
    plan = plan_for_steps(model, F.cross_entropy, batch)
    F.cross_entropy(batch.forward(model), batch.targets).backward()
    expected = gradients_of(model)
    model.zero_grad()
    with StepGradients(model, plan, batch.size, ask=[SquaredNorms()]) as step:
        backward(F.cross_entropy(batch.forward(model), batch.targets))
    for found, truth in zip(gradients_of(model), expected, strict=True):
        assert torch.equal(found, truth)
    norms = ModelGradients(model, F.cross_entropy, [batch]).norms()
    torch.testing.assert_close(step.norms(), norms, rtol=1e-5, atol=0)  # float32
