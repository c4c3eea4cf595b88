"""Loops in which backward() is never called, by a closure that forgets it too."""

import pytest
import torch
from torch import nn

import diag
from diag.instruments.causes import Cause


def told(step, optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = optimizer(model.parameters())
    with diag.watch(model, instruments=["step_order"]) as watcher:
        for _ in range(8):
            x, y = torch.randn(16, 3), torch.randn(16, 1)

            def evaluate(backward, x=x, y=y):
                optimizer.zero_grad()
                value = (model(x) - y).square().mean()
                if backward:
                    value.backward()
                return value

            step(optimizer, evaluate, model)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return [f.verdict for f in watcher.findings]


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, max_iter=3)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def in_closure(backward):
    return lambda optimizer, evaluate, model: optimizer.step(lambda: evaluate(backward))


def before(backward):
    def step(optimizer, evaluate, model):
        evaluate(backward)
        optimizer.step()

    return step


def by_hand(optimizer, evaluate, model):
    """Gradients that torch.autograd.grad gives, without backward()."""
    value = evaluate(False)
    for p, g in zip(model.parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize(("step", "optimizer"), [(in_closure, lbfgs), (in_closure, sgd), (before, sgd)])
def test_a_loop_without_backward_is_found(step, optimizer):
    (verdict,) = told(step(False), optimizer)
    assert verdict.level == "alarm" and verdict.cause == Cause.GRADIENT_ABSENT
    assert verdict.sentence.startswith("backward() is never called: the optimizer has stepped")
    assert told(step(True), optimizer) == []


def test_a_backward_pass_that_does_not_reach_the_network_is_not_called_none():
    def step(optimizer, evaluate, model):
        torch.tensor(evaluate(False).item(), requires_grad=True).backward()
        optimizer.step()

    assert not [v for v in told(step, sgd) if "never called" in v.sentence]


def test_gradients_that_are_set_by_hand_are_left_alone():
    assert told(by_hand, sgd) == []
