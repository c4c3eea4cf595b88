"""What a check says of a loop where it finds nothing is true, too: what happens once may be meant, and is told."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause

X = torch.randn(480, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
STEPS = 12


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))


class Unused(nn.Module):
    """A layer that no call uses, and one whose parameters are frozen."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = (
            nn.Linear(6, 3),
            nn.Linear(6, 3),
            nn.Linear(6, 6).requires_grad_(False),
        )

    def forward(self, x):
        return self.used(self.frozen(x))


def passed(model, s, data=X):
    """The backward pass of step s."""
    rows = slice(s % 10 * 48, s % 10 * 48 + 48)
    F.cross_entropy(model(data[rows]), Y[rows]).backward()


def usual(model, optimizer, s):
    optimizer.zero_grad()
    passed(model, s)
    optimizer.step()


def not_zeroed_once(model, optimizer, s):
    if s != 5:
        optimizer.zero_grad()
    passed(model, s)
    optimizer.step()


def stepped_twice_once(model, optimizer, s):
    usual(model, optimizer, s)
    if s == 5:
        optimizer.step()


def in_eval_mode_once(model, optimizer, s):
    model.train(s != 5)
    usual(model, optimizer, s)


def in_turn(model, optimizer, s):
    usual(model, optimizer, s % 3)


def clamped(model, optimizer, s):
    usual(model, optimizer, s)
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)


def down_to_zero(model, optimizer, s):
    optimizer.param_groups[0]["lr"] = 0.1 * (1 - s / (STEPS - 1))
    usual(model, optimizer, s)


def without_a_class(model, optimizer, s):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y, weight=torch.tensor([1.0, 0.0, 1.0])).backward()
    optimizer.step()


def of_stored_data(change):
    data = X.clone()

    def body(model, optimizer, s):
        if s == change:
            data[:48] *= 1.01
        optimizer.zero_grad()
        passed(model, s, data)
        optimizer.step()

    return body


CASES = {
    "zeroed": ("gradient_zeroing", net, usual, r"Gradients were reset before all 12 steps\."),
    "not zeroed once": ("gradient_zeroing", net, not_zeroed_once, r"but for 1 of 12 steps, which may be meant\."),
    "in order": ("step_order", net, usual, r"A backward pass of its own came before all 12 steps\."),
    "stepped twice once": ("step_order", net, stepped_twice_once, r"but for 1 of 13 steps, which may be meant\."),
    "reached": ("gradients_reach", net, usual, r"Every trainable parameter got a gradient within 12 steps\."),
    "unused": ("gradients_reach", Unused, usual, r"Of 4 trainable parameters 2 got a gradient within 12 steps; "),
    "held": ("parameters_held", net, usual, r"All 6 parameters that got a gradient are in an optimizer"),
    "held, of some": (
        "parameters_held",
        Unused,
        usual,
        r"All 2 parameters that got a gradient are in",
    ),
    "train mode": ("module_modes", net, usual, r"2 modules with dropout or batch norm trained in train mode\."),
    "eval mode once": (
        "module_modes",
        net,
        in_eval_mode_once,
        r"in eval mode at 1 of 12 steps, which",
    ),
    "batches differ": ("batches_repeated", net, usual, r"12 batches were seen"),
    "three batches": ("batches_repeated", net, in_turn, r"came again, 3 batches later, is not judged\."),
    "kept": ("data_kept", net, of_stored_data(-1), r"Stored data has not changed where it was seen again\."),
    "changed once": ("data_kept", net, of_stored_data(4), r"Stored data was changed between 1 of \d+ calls"),
    "rate of zero": (
        "learning_rate_schedule",
        net,
        down_to_zero,
        r"No fault of the learning rate's course",
    ),
    "left out": ("class_weights", net, without_a_class, r"Of classes with a weight above zero none was found"),
    "own weights": ("outside_changes", net, usual, r"were what the step before had left, as far as a few numbers"),
    "clamped": ("outside_changes", net, clamped, r"changes the weights between steps, \d+ times in 12 steps; "),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_loop_without_a_finding_holds(name):
    check, make, body, said = CASES[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[check]) as watcher:
        for s in range(STEPS):
            body(model, optimizer, s)
    (found,) = watcher.run.findings()
    assert found.verdict.level == "ok"
    assert re.search(said, found.verdict.sentence), found.verdict.sentence


def test_what_was_not_looked_at_is_not_spoken_of():
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["gradient_zeroing", "step_order"]) as watcher:
        for s in range(120):
            usual(model, optimizer, s)
    for found in watcher.run.findings():
        assert "steps that were looked at" in found.verdict.sentence


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_phases_of_a_watched_training_are_known_by_its_loader(epochs):
    model, data = nn.Linear(6, 3), TensorDataset(X[:40], Y[:40])
    with diag.watch(model, instruments=["optimizer_kept"]) as watcher:
        for rate in (1e-2, 1e-3, 1e-4):
            optimizer = torch.optim.Adam(model.parameters(), rate)
            for x, y in itertools.chain.from_iterable([DataLoader(data, 10, shuffle=True)] * epochs):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    told = [f.verdict.cause for f in watcher.findings]
    assert told == ([Cause.OPTIMIZER_RECREATED] if epochs == 1 else [])
