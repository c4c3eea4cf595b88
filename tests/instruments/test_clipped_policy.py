"""The clipped objective of proximal policy optimization: its sign is read as that of a plain policy gradient."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.formula.parts import parts_of
from diag.watching.observe.loop.formula.rewards.clipped_policy import log_probabilities_clipped

N, D, A = 64, 5, 3


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(D, 16), nn.Linear(16, A), nn.Linear(16, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.policy(h), self.value(h).squeeze(1)


def smaller(a, b):
    return -torch.min(a, b).mean()


def larger(a, b):
    return torch.max(-a, -b).mean()


def told(sign=1.0, join=smaller, steps=8):
    torch.manual_seed(0)
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with diag.watch(model, instruments=["policy_loss"]) as watcher:
        for _ in range(steps):
            states, actions, returns = torch.randn(N, D), torch.randint(A, (N,)), torch.randn(N)
            with torch.no_grad():
                logits, values = model(states)
                before, advantages = Categorical(logits=logits).log_prob(actions), sign * (returns - values)
                advantages = (advantages - advantages.mean()) / advantages.std()
            logits, values = model(states)
            ratio = (Categorical(logits=logits).log_prob(actions) - before).exp()
            clipped = join(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            entropy = Categorical(logits=logits).entropy().mean()
            optimizer.zero_grad()
            (clipped + 0.5 * F.mse_loss(values, returns) - 0.01 * entropy).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


@pytest.mark.parametrize("join", [smaller, larger])
def test_an_advantage_with_the_wrong_sign_is_named(join):
    (finding,) = told(-1.0, join)
    assert finding.verdict.cause == Cause.LOSS_ASCENDED


@pytest.mark.parametrize("join", [smaller, larger])
def test_the_right_sign_is_left_in_peace(join):
    assert not told(join=join)


def test_the_smaller_of_other_things_is_left_as_it_is():
    a, b = torch.randn(N, requires_grad=True), torch.randn(N)
    (part,) = parts_of(torch.min(a * b, 2 * a * b).mean())
    assert log_probabilities_clipped(part) is part
