"""Trainers that do something unusual between two steps: what is recorded is right, and training is the same."""

import contextlib
import copy
import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import diag

CHEAP = ["softmax_collapse", "gradient_coherence"]


def batches(helpers, size=16):
    x, y = helpers.images(64)
    return list(zip(x.split(size), y.split(size), strict=True))


# Bit-identity under unusual steps, measured at every one of them.


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: up the gradient, a second gradient there, back and down with that one."""

    def __init__(self, parameters, base, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base = base(self.param_groups)

    @torch.no_grad()
    def first_step(self):
        parameters = [p for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def sam_by_hand(model, data, losses):
    optimizer = Sam(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9))
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.first_step()
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step()
        losses.append(loss.item())


def sam_by_closure(model, data, losses):
    optimizer = Sam(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9))
    for x, y in data:

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(closure().item())
        optimizer.step(closure)


class EightBit(torch.optim.Optimizer):
    """Momentum kept in 8 bits with one scale a tensor, in an optimizer of its own."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                kept = state["codes"].float() * state["scale"] if state else torch.zeros_like(p)
                momentum = 0.9 * kept + p.grad
                scale = momentum.abs().max() / 127 + 1e-12
                state["codes"], state["scale"] = (momentum / scale).round().to(torch.int8), scale
                p.add_(momentum, alpha=-group["lr"])


class ScheduleFree(torch.optim.Optimizer):
    """Trains at y, an interpolation of the iterates z and their average x, and evaluates at x (in eval mode)."""

    def __init__(self, parameters, lr=0.05, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "at_average": False})

    @torch.no_grad()
    def _move(self, weight, at_average):
        for group in self.param_groups:
            if group["at_average"] != at_average:
                for p in (p for p in group["params"] if "z" in self.state[p]):
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["at_average"] = at_average

    def eval(self):
        self._move(lambda beta: 1 - 1 / beta, True)

    def train(self):
        self._move(lambda beta: 1 - beta, False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"]).add_(
                    p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1)
                )
                z.sub_(p.grad, alpha=group["lr"])


def stepping(make, around=contextlib.nullcontext):
    def train(model, data, losses):
        optimizer = make(model.parameters())
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            with around():
                optimizer.step()
            losses.append(loss.item())

    return train


def schedule_free(model, data, losses):
    optimizer = ScheduleFree(model.parameters())
    for x, y in data:
        model.train()
        optimizer.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()
        optimizer.eval()
        F.cross_entropy(model(x), y)


def scaled_half_precision(model, data, losses):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())


def evaluated_average(model, data, losses):
    """A moving average of the model, evaluated by itself and in the model's place after every step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
        F.cross_entropy(average(x), y)  # gradients are on, and nobody asks for them
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.module.state_dict())
        model.eval()
        F.cross_entropy(model(x), y)
        model.load_state_dict(kept)
        model.train()


TRAININGS = {
    "SAM by hand": sam_by_hand,
    "SAM by closure": sam_by_closure,
    "8 bits": stepping(EightBit),
    "schedule-free": schedule_free,
    "fused": stepping(lambda p: torch.optim.AdamW(p, 1e-2, fused=True)),
    "foreach": stepping(lambda p: torch.optim.RMSprop(p, 1e-3, foreach=True)),
    "step without gradients": stepping(lambda p: torch.optim.Adam(p, 1e-2), torch.no_grad),
    "step in inference mode": stepping(lambda p: torch.optim.SGD(p, 1e-2), torch.inference_mode),
    "autocast and scaler": scaled_half_precision,
    "evaluated average": evaluated_average,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_the_same_and_its_losses_are_recorded(name, helpers):
    def train(model):
        losses.clear()
        TRAININGS[name](model, batches(helpers), losses)

    losses = []
    unwatched, _ = helpers.final_state(train, watched=False)
    watched, run = helpers.final_state(train, True, budget=math.inf, instruments=CHEAP)
    helpers.assert_identical(watched, unwatched)
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    assert run.history.steps.tolist() == list(range(1, len(losses) + 1))
    assert numpy.isfinite(run.history.gradient_norm).all()
    assert run.instruments == tuple(CHEAP), run.outcomes
    assert not [e for e in run.events if e.kind == "internal error"]
    moved = "The parameters were moved between two backward passes of one step" in helpers.texts(run)
    assert moved == name.startswith("SAM")
