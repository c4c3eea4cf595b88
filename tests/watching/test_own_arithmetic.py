"""Losses that are written out by hand: the targets that they ask for, and what is compared with what."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.data import own as own_losses
from diag.watching.observe.loop.data.own import ModelOutputs, difference_behind

N, D = 24, 6


def behind(loss, *outputs):
    followed = ModelOutputs()
    for output in outputs:
        followed.training_call(output)
    return difference_behind(loss, followed.before_backward())


def made(*shape):
    """What a model gave, and targets."""
    return torch.randn(shape, requires_grad=True) * 1.0, torch.randn(shape) + 2


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (lambda p, t: ((p - t) ** 2).mean(), "mse_loss"),
        (lambda p, t: (t - p).pow(2).mean(), "mse_loss"),
        (lambda p, t: (p - t).square().mean(), "mse_loss"),
        (lambda p, t: torch.mean((p - t) * (p - t)), ""),  # two differences, as the graph has it
        (lambda p, t: (lambda d: (d * d).mean())(p - t), "mse_loss"),
        (lambda p, t: (p.reshape(-1) - t.reshape(-1)).abs().mean(), "l1_loss"),
    ],
)
def test_the_targets_are_what_the_difference_leaves(loss, function):
    output, target = made(N, 3)
    found = behind(loss(output, target), output)
    assert (found.function if found else "") == function
    if found:
        # One rounding of the difference, one of the sum: a few times 2^-24 of the numbers' size.
        assert torch.allclose(found.targets.reshape(N, 3), target, rtol=0, atol=1e-6)
        value = getattr(nn.functional, found.function)(found.output, found.targets)
        assert value.item() == pytest.approx(loss(output, target).item(), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, t: ((p - t) ** 3).mean(),
        lambda p, t: ((p - t) ** 2).sum(),  # it depends on how many there are
        lambda p, t: ((p - t) ** 2).mean(0).sum(),
        lambda p, t: 0.5 * ((p - t) ** 2).mean(),
        lambda p, t: ((p - t) ** 2).mean() + p.abs().mean(),
        lambda p, t: ((p.sigmoid() - t) ** 2).mean(),
        lambda p, t: ((p - 2 * p.mean()) ** 2).mean(),
        lambda p, t: ((p - 1) ** 2).mean(),  # the real half of two networks
        lambda p, t: (p**2).mean(),
        lambda p, t: (p[:, :2] - t[:, :2]).abs().mean(),
    ],
)
def test_what_is_more_or_less_than_such_a_difference_is_left_alone(loss):
    output, target = made(N, 3)
    assert behind(loss(output, target), output) is None


def test_shapes_that_broadcast_against_each_other():
    output, target = made(N, 3)
    for wide, other in [(output.unsqueeze(1), target.unsqueeze(0)), (output[:, None], target[None])]:
        assert behind(((wide - other) ** 2).mean(), output).expanded == ((N, 1, 3), (1, N, 3))
    several = ((output.unsqueeze(1) - torch.randn(N, 5, 3)) ** 2).mean()  # samples of each target
    assert behind(several, output) is None


def test_of_many_targets_some_tell_whether_they_vary(monkeypatch):
    monkeypatch.setattr(own_losses, "NUMBERS_OF_SPREAD", 8)
    output = torch.randn(50, 3, requires_grad=True) * 1.0
    assert behind(((output - torch.randn(50, 3)) ** 2).mean(), output)
    assert behind(((output - torch.ones(50, 3)) ** 2).mean(), output) is None


def test_what_lies_on_a_device_is_not_waited_for():
    """A meta tensor raises where a number of it is asked for."""
    output = torch.randn(4, 3, device="meta", requires_grad=True) * 1.0
    assert behind(((output - torch.randn(4, 3, device="meta")) ** 2).mean(), output) is None


@pytest.mark.parametrize("loss", [F.mse_loss, lambda p, t: ((p - t) ** 2).mean()], ids=["torch's", "own"])
def test_outputs_are_not_kept_in_memory_past_the_step(loss):
    model, kept = nn.Linear(D, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["loss_call"]):
        for _ in range(4):
            output = model(torch.randn(N, D))
            kept.append(StorageWeakRef(output.untyped_storage()))
            optimizer.zero_grad()
            loss(output, torch.randn(N, 3)).backward()
            optimizer.step()
            del output
        assert [k.expired() for k in kept] == [True] * 4


def watched(targets, steps=130, loss=lambda p, t: ((p - t) ** 2).mean()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["constant_answer", "loss_call"]) as watcher:
        for _ in range(steps):
            x = torch.randn(64, D)
            optimizer.zero_grad()
            loss(model(x), targets(x)).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause for f in watcher.findings}


def test_targets_that_do_not_belong_to_the_inputs_are_found_in_own_arithmetic():
    assert watched(lambda x: torch.randn(len(x), 3)) == {Cause.WORSE_THAN_TRIVIAL}
    assert watched(lambda x: x[:, :3].tanh()) == set()


def test_every_output_compared_with_every_target():
    def loss(p, t):
        return ((p.unsqueeze(1) - t.unsqueeze(0)) ** 2).mean()

    assert watched(lambda x: x[:, :3], 5, loss) == {Cause.TARGETS_BROADCAST}


def test_chunks_of_one_tensor_are_told_apart():
    """Their graph has one node: which of its outputs is compared decides what the targets are."""
    both, target = made(N, 6)[0], torch.randn(N, 3)
    mean, other = both.chunk(2, 1)
    for compared in (mean, other):
        found = behind(((compared - target) ** 2).mean(), mean, other)
        assert torch.allclose(found.targets, target, atol=1e-6)
