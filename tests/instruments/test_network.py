"""Checks of the network, each on one that has the fault, one that has not, and one that it does not apply to."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.network.initial_scale import InitialScale
from diag.instruments.network.output_constant import OutputConstant
from diag.instruments.network.unit_copies import UnitCopies
from diag.snapshot.history import empty_history


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(64, 8), torch.randint(0, 3, (64,))


def mlp(act=nn.ReLU, depth=3, width=16):
    torch.manual_seed(1)
    layers = [nn.Linear(8, width), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def weights(model):
    return [p for p in model.parameters() if p.ndim > 1]


def snapshot(model, data):
    return diag.Snapshot(model, F.cross_entropy, data)


def test_dead_units_are_named_with_their_layer(data):
    model = mlp()
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    result = diag.dead_units(snapshot(model, data))
    verdict = result.verdict()
    assert result.worst == 1.0 and verdict.layers == ("3",) and verdict.cause == Cause.UNITS_DEAD
    assert "of the units of layer 3 are dead" in verdict.sentence
    assert diag.dead_units(snapshot(mlp(), data)).verdict().level == "ok"
    assert diag.dead_units(snapshot(mlp(nn.GELU), data)).verdict().level == "not_applicable"


def test_saturation_of_tanh_and_not_of_the_last_function(data):
    model = mlp(nn.Tanh)
    assert diag.saturation(snapshot(model, data)).verdict().level == "ok"
    with torch.no_grad():
        model[0].weight.mul_(100.0)
    verdict = diag.saturation(snapshot(model, data)).verdict()
    assert verdict.cause == Cause.UNITS_SATURATED and verdict.layers == ("1",)
    bounded = nn.Sequential(mlp(), nn.Tanh())
    with torch.no_grad():
        bounded[0][4].weight.mul_(1e3)  # what the network returns may be near its ends
    assert diag.saturation(snapshot(bounded, data)).verdict().level == "not_applicable"


def test_an_output_that_does_not_depend_on_the_input_counts_once_training_is_under_way(data):
    model = mlp()
    with torch.no_grad():
        model[4].weight.zero_()
    constant, healthy = (diag.output_constant(snapshot(m, data)) for m in (model, mlp()))
    assert OutputConstant.trend([(1, constant)]).level == "unknown"
    verdict = OutputConstant.trend([(1, healthy), (8, constant), (20, constant)])
    assert verdict.level == "alarm" and verdict.step == 8 and verdict.layers == ("4",)
    assert OutputConstant.trend([(1, constant), (20, healthy)]).level == "ok"


@pytest.mark.parametrize(("start", "level"), [(0.0, "alarm"), (0.1, "alarm"), (None, "ok")])
def test_units_that_are_copies(data, start, level):
    model = mlp()
    if start is not None:
        for p in model.parameters():  # biases too: where they differ, units do
            nn.init.constant_(p, start if p.ndim > 1 else 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    result = diag.unit_copies(snapshot(model, data))
    assert UnitCopies.trend([(12, result)]).level == level
    assert UnitCopies.trend([(3, result)]).level == ("ok" if level == "ok" else "unknown")


def test_copies_that_no_step_was_taken_on_are_ends_of_branches(data):
    model = mlp(depth=4)
    for layer in list(model)[::2][:3]:
        nn.init.zeros_(layer.weight)
    names = dict(model.named_parameters())
    made = empty_history({name: p.numel() for name, p in names.items()}, 20)
    pushed = numpy.ones((20, len(names)), numpy.float32)

    def copies(**record):
        found = diag.unit_copies(params=names, history=dataclasses.replace(made, gradient_norm=pushed, **record))
        return UnitCopies.trend([(20, found)]).level

    assert copies() == "alarm"  # no step was measured, so nothing speaks against it
    assert copies(skipped=numpy.ones(20, bool)) == "ok"  # a gradient scaler left all steps out
    assert copies(update_norm=numpy.zeros_like(pushed)) == "ok"  # gradients are zeroed before each step
    assert copies(update_norm=pushed) == "alarm"
    left_out = numpy.array([numpy.nan if n.endswith("weight") else 1.0 for n in names], numpy.float32) * pushed
    assert copies(update_norm=left_out) == "ok"  # no optimizer holds them


def test_a_branch_that_starts_at_zero_is_no_copy(data):
    model = mlp(depth=4)
    nn.init.zeros_(model[-1].weight)
    assert UnitCopies.trend([(12, diag.unit_copies(snapshot(model, data)))]).level == "ok"


@pytest.mark.parametrize(
    ("factor", "cause"), [(1e-5, Cause.GRADIENTS_VANISH), (1e5, Cause.GRADIENTS_EXPLODE), (0.1, "")]
)
def test_gradients_over_the_depth(factor, cause):
    layers = {f"{i}.{kind}": size for i in range(8) for kind, size in (("weight", 256), ("bias", 16))}
    course = numpy.geomspace(factor, 1.0, 8).repeat(2) * numpy.sqrt(list(layers.values()))
    norms = numpy.tile(course, (30, 1)).astype(numpy.float32)
    history = dataclasses.replace(empty_history(layers, 30), gradient_norm=norms)
    result = diag.gradient_depth(history=history)
    assert result.verdict().cause == cause
    # the first two and the last two of eight layers: 0.5 and 6.5 sevenths of the way
    assert result.factor == pytest.approx(factor ** (6 / 7), rel=0.6)


def test_gradients_that_vanish_since_a_step():
    layers = {f"{i}.weight": 256 for i in range(8)}
    norms = numpy.ones((60, 8), numpy.float32)
    norms[40:] *= numpy.geomspace(1e-6, 1, 8)
    history = dataclasses.replace(empty_history(layers, 60), gradient_norm=norms)
    verdict = diag.gradient_depth(history=history).verdict()
    assert verdict.cause == Cause.GRADIENTS_VANISH and abs(verdict.step - 41) <= 2  # medians of five steps
    assert Cause.OUTPUT_CONSTANT not in verdict.explained_by  # it is what a vanished signal looks like


def test_gradients_that_became_zero_have_vanished_and_those_that_never_were_are_left_out():
    norms = numpy.ones((60, 9), numpy.float32)
    norms[20:, :4], norms[:, 8] = 0, 0  # the last one never had any
    made = empty_history({f"{i}.weight": 256 for i in range(9)}, 60)
    result = diag.gradient_depth(history=dataclasses.replace(made, gradient_norm=norms))
    verdict = result.verdict()
    assert (verdict.cause, verdict.level, result.factor) == (Cause.GRADIENTS_VANISH, "alarm", 0.0)
    assert "those of the first layers are exactly zero by now" in verdict.sentence and len(result.layers) == 8
    assert abs(verdict.step - 21) <= 2  # medians of five steps
    norms[20:] = 0
    nothing = diag.gradient_depth(history=dataclasses.replace(made, gradient_norm=norms)).verdict()
    assert nothing.level == "not_applicable" and "gradients of the last layers are zero" in nothing.sentence
    norms[20:, 4:8], norms[20:, :5] = 1, numpy.nan  # frozen since: not measured
    few = diag.gradient_depth(history=dataclasses.replace(made, gradient_norm=norms)).verdict()
    assert few.level == "not_applicable" and "fewer than 4 weights were seen to get a gradient" in few.sentence


@pytest.mark.parametrize("offset", [20.0, 0.0])
def test_a_loss_far_below_its_first_value_is_not_done_where_a_constant_answer_is_as_good(offset):
    """Sigmoids ten deep answer with the mean of the targets: from targets that lie far from zero, that alone takes
    the loss below a hundredth of its first value."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1) / 8**0.5 + offset
    model = nn.Sequential(*[m for i in range(10) for m in (nn.Linear(8 if i == 0 else 24, 24), nn.Sigmoid())])
    model.append(nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    losses = []
    with diag.watch(model, instruments=["gradient_depth"]) as watcher:
        for rows in torch.arange(6000).remainder(256).split(64):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert (losses[-1] < 0.01 * losses[0]) == (offset > 0) and losses[-1] > 0.3
    (finding,) = watcher.run.findings()
    assert finding.verdict.level == "alarm" and finding.verdict.cause == Cause.GRADIENTS_VANISH


def test_a_shallow_network_is_not_judged_by_its_depth():
    history = empty_history({"0.weight": 256, "1.weight": 256}, 5)
    assert diag.gradient_depth(history=history).verdict().level == "not_applicable"


def test_the_first_layer_that_is_not_finite_is_named(data):
    model = mlp(depth=4)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    verdict = diag.finite_forward(snapshot(model, data)).verdict()
    assert verdict.level == "alarm" and verdict.layers == ("2",) and verdict.cause == Cause.NOT_FINITE
    assert diag.finite_forward(snapshot(mlp(), data)).verdict().level == "ok"
    assert diag.dead_units(snapshot(model, data)).verdict().level == "not_applicable"


class Masked(nn.Module):
    """Rules a class out, as a padded vocabulary does."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)


def test_a_masked_logit_is_no_fault(data):
    x, _ = data
    snapshot = diag.Snapshot(Masked(), F.cross_entropy, (x, torch.zeros(len(x), dtype=torch.long)))
    assert diag.finite_forward(snapshot).verdict().level == "ok"


@pytest.mark.parametrize(("factor", "level"), [(1.0, "ok"), (8.0, "warning"), (0.01, "warning")])
def test_weights_that_start_too_large_or_too_small(data, factor, level):
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor if p.ndim > 1 else 0.0)
    result = diag.initial_scale(snapshot(model, data))
    assert InitialScale.trend([(1, result)]).level == level
    assert InitialScale.trend([(50, result)]).level == "not_applicable"
    # torch's default variance is 1 / (3 fan-in)
    assert result.gains[0] == pytest.approx(factor / 3**0.5, rel=0.2)


class Two(nn.Module):
    """A regression and the weights of its gate, which start even."""

    def __init__(self, constant):
        super().__init__()
        self.constant, self.answer, self.gate = constant, mlp(), nn.Linear(8, 4)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        answer = self.answer(x)[:, 0]
        return (answer * 0 + 1 if self.constant else answer), self.gate(x).softmax(1)


@pytest.mark.parametrize("constant", [True, False])
def test_of_several_outputs_the_first_is_what_the_network_gives(data, constant):
    torch.manual_seed(0)
    made = diag.Snapshot(Two(constant), lambda out, y: out[0].square().mean(), data)
    verdict = OutputConstant.trend([(20, diag.output_constant(made))])
    assert verdict.level == ("alarm" if constant else "ok")


def test_another_output_that_varies_is_mentioned(data):
    class Swapped(Two):
        def forward(self, x):
            answer, gate = super().forward(x)
            return gate, answer

    made = diag.Snapshot(Swapped(False), lambda out, y: out[1].square().mean(), data)
    assert "first output (others, 1, do vary)" in OutputConstant.trend([(20, diag.output_constant(made))]).sentence


def test_weights_that_start_too_large_are_seen_beside_biases_that_start_at_zero(data):
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0 if p.ndim > 1 else 0.0)
    made = empty_history({"0.weight": 128, "0.bias": 64}, 1)
    moved = {"update_norm": [[0.01, 0.5]], "parameter_norm": [[4.0, 0.5]], "distance": [[0.01, 0.5]]}
    history = dataclasses.replace(made, **{k: numpy.array(v, numpy.float32) for k, v in moved.items()})
    measured = diag.initial_scale(snapshot(model, data), history=history)
    assert InitialScale.trend([(5, measured)]).level == "warning"
    far = dataclasses.replace(history, distance=numpy.array([[1.0, 0.5]], numpy.float32))
    assert diag.initial_scale(snapshot(model, data), history=far).verdict().level == "not_applicable"
    thrown = {"update_norm": [[4e3, 0.5]], "parameter_norm": [[4e3, 0.5]], "distance": [[4e3, 0.5]]}
    thrown = {
        k: numpy.array(v, numpy.float32) for k, v in thrown.items()
    }  # as large as they are far from the start
    away = diag.initial_scale(snapshot(model, data), history=dataclasses.replace(made, **thrown))
    assert away.verdict().level == "not_applicable"
    left = dataclasses.replace(empty_history({"0.weight": 128}, 3), loss=numpy.array([1.0, 9.0, 9.0]))
    assert diag.initial_scale(snapshot(model, data), history=left).verdict().level == "not_applicable"
