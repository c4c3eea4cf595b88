"""Steps of a whole side of a training that are next to nothing, and steps that replaced weights under a loss that
is bounded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause


class Game(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def game(generator_rate, discriminator_rate=1e-3, steps=120):
    """The verdict on a game of two networks."""
    torch.manual_seed(0)
    model = Game()
    a = torch.optim.Adam(model.generator.parameters(), lr=generator_rate)
    b = torch.optim.Adam(model.discriminator.parameters(), lr=discriminator_rate)
    one, zero = torch.ones(32, 1), torch.zeros(32, 1)
    with diag.watch(model, instruments=["step_size"]) as watcher:
        for _ in range(steps):
            real, made = torch.randn(32, 8) + 1, model.generator(torch.randn(32, 4))
            loss = F.binary_cross_entropy_with_logits(model.discriminator(real), one)
            loss = loss + F.binary_cross_entropy_with_logits(model.discriminator(made.detach()), zero)
            b.zero_grad()
            loss.backward()
            b.step()
            answer = model.discriminator(model.generator(torch.randn(32, 4)))
            a.zero_grad()
            F.binary_cross_entropy_with_logits(answer, one).backward()
            a.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run.findings()[0].verdict


def test_a_side_whose_steps_are_next_to_nothing_is_told():
    verdict = game(1e-8)
    assert verdict.cause == Cause.LEARNING_RATE_TOO_LOW and "generator.0" in verdict.sentence
    assert "discriminator" not in verdict.sentence
    assert "discriminator.0" in game(1e-3, 1e-8).sentence


@pytest.mark.parametrize("rates, steps", [((1e-3, 1e-3), 120), ((1e-4, 4e-4), 120), ((1e-8, 1e-3), 60)])
def test_quiet_on_sides_that_move_and_on_a_short_training(rates, steps):
    assert game(*rates, steps=steps).cause != Cause.LEARNING_RATE_TOO_LOW


def contrast(rate, noise, steps=110):
    """The verdict on a contrastive training, whose loss lies between bounds whatever becomes of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    rows = torch.rand(256, 16)
    with diag.watch(model, instruments=["step_size"]) as watcher:
        for _ in range(steps):
            x = rows[torch.randint(0, 256, (64,))]
            one, other = (F.normalize(model(x + noise * torch.randn_like(x)), dim=1) for _ in range(2))
            optimizer.zero_grad()
            F.cross_entropy(one @ other.T / 0.5, torch.arange(64)).backward()
            optimizer.step()
    return watcher.run.findings()[0].verdict


def test_steps_that_replaced_the_weights_are_told_under_a_loss_that_cannot_rise():
    assert contrast(1.0, noise=10.0).cause == Cause.LEARNING_RATE_TOO_HIGH


def test_quiet_where_the_loss_fell_all_the_same_or_steps_are_as_usual():
    assert contrast(1.0, noise=0.05).level == "ok"
    assert contrast(2e-3, noise=10.0).cause != Cause.LEARNING_RATE_TOO_HIGH
