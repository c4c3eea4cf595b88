"""What values of actions are compared with: the values of next states, by a network that is synchronised."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.arithmetic import ActionFacts, ActionLook
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import CopyFacts
from diag.watching.observe.loop.formula.rewards.next_values import discount_in, settled_in

N, STATES, A = 32, 20, 3
STEPS = 210


class DeepQ:
    """Steps of deep Q-learning on transitions that are drawn at random."""

    def __init__(self, fault="", double=False, target=True, soft=0.0, every=20):
        torch.manual_seed(0)
        self.fault, self.double, self.soft, self.every = fault, double, soft, every
        self.q = nn.Sequential(nn.Linear(STATES, 16), nn.ReLU(), nn.Linear(16, A))
        self.target = copy.deepcopy(self.q) if target else self.q
        self.optimizer = torch.optim.Adam(self.q.parameters(), 5e-3)

    def next_values(self, states):
        values = self.target(states)
        if self.double:
            return values.gather(1, self.q(states).argmax(1, keepdim=True)).squeeze(1)
        return values.max(1).values

    def targets(self, following, ends, rewards):
        mask = ends if self.fault == "mask inverted" else 1 - ends
        return rewards + {"discount": 1.2}.get(self.fault, 0.9) * self.next_values(following) * mask

    def step(self, number):
        states, following = (F.one_hot(torch.randint(STATES, (N,)), STATES).float() for _ in range(2))
        rewards, ends = torch.tensor([0.0, -1.0])[torch.randint(2, (N,))], (torch.rand(N) < 0.08).float()
        with torch.no_grad():
            self.q(states[:1])
        if self.fault == "through":
            targets = self.targets(following, ends, rewards)
        else:
            with torch.no_grad():
                targets = self.targets(following, ends, rewards)
        actions = torch.randint(A, (N,)) * (self.fault != "one action")
        loss = F.mse_loss(self.q(states).gather(1, actions[:, None]).squeeze(1), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.soft:
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.q.parameters(), strict=True):
                    slow.lerp_(fast, self.soft)
        elif number % self.every == 0 and self.fault != "frozen":
            self.target.load_state_dict(self.q.state_dict())


def told(steps=STEPS, **about):
    loop = DeepQ(**about)
    with diag.watch(loop.q, instruments=["action_values"]) as watcher:
        for number in range(steps):
            loop.step(number)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    assert not loop.target._forward_hooks
    return watcher.findings


FAULTS = {
    "frozen": (Cause.COPY_NOT_FOLLOWING, "never synchronised"),
    "discount": (Cause.BOOTSTRAP_WRONG, "targets hold 1.2 times"),
    "mask inverted": (Cause.BOOTSTRAP_WRONG, "one of 2 numbers (-1, 0)"),
    "through": (Cause.BOOTSTRAP_WRONG, "gradient goes into the targets"),
    "one action": (Cause.ACTION_NOT_TAKEN, "the index is 0 in every row"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_targets_are_named(fault):
    cause, words = FAULTS[fault]
    (finding,) = told(fault=fault, target=fault != "through")
    assert finding.verdict.cause == cause and words in finding.verdict.sentence


@pytest.mark.parametrize(
    "about", [{}, {"double": True}, {"soft": 0.01}, {"double": True, "soft": 0.01}, {"target": False}]
)
def test_targets_as_they_should_be_are_left_in_peace(about):
    assert not told(**about)


def test_a_double_network_that_is_never_synchronised_is_named():
    (finding,) = told(fault="frozen", double=True)
    assert finding.verdict.cause == Cause.COPY_NOT_FOLLOWING


def test_a_copy_whose_values_do_not_enter_the_targets_is_no_target_network():
    """Kept from the start to compare with, and called at each step."""
    loop = DeepQ(target=False)
    kept = copy.deepcopy(loop.q)
    with diag.watch(loop.q, instruments=["action_values"]) as watcher:
        for number in range(STEPS):
            with torch.no_grad():
                kept(torch.randn(N, STATES))
            loop.step(number)
    assert not watcher.findings


def test_a_training_too_short_to_synchronise_in_and_a_run_that_goes_on_are_not_judged():
    looks = tuple(ActionLook(k, False, True, discount=0.9, copy=0) for k in range(5))
    still = CopyFacts("copy", None, 0.0, 0, 6, number=0)

    def level(step, **about):
        about = {"copies": (still,)} | about
        return diag.action_values(loop=Loop(step, actions=ActionFacts(looks), **about)).verdict().level

    assert level(300) == "warning"
    assert level(100) == "ok" and level(300, resumed=200) == "ok" and level(300, copies=()) == "ok"
    assert level(300, copies=(CopyFacts("copy", None, 0.0, 0, 6, number=1),)) == "ok"
    assert level(300, copies=(CopyFacts("copy", None, 0.5, 1, 6, number=0),)) == "ok"


def test_the_discount_is_read_from_rows_of_one_reward_and_not_from_numbers_that_have_none():
    rng = numpy.random.default_rng(0)
    values, rewards = rng.normal(size=64), rng.choice([-1.0, 0.0, 2.0], 64)
    ends = rng.random(64) < 0.2
    assert discount_in(rewards + 0.97 * values * ~ends, values) == pytest.approx(0.97, rel=1e-6)
    assert numpy.isnan(discount_in(rng.normal(size=64), values))
    assert numpy.isnan(discount_in(rng.normal(size=64) + 0.97 * values, values))
    assert numpy.isnan(discount_in(values, values))
    assert numpy.isnan(discount_in(numpy.zeros(4), numpy.arange(4.0)))
    assert numpy.isnan(discount_in(numpy.full(64, numpy.nan), values))


def test_settled_rows_are_those_whose_number_is_one_whatever_the_values_are():
    values = numpy.arange(10.0)
    assert settled_in(numpy.zeros(10), values) == (1.0, (0.0,))
    assert settled_in(values, values) == (0.0, ())
    assert settled_in(numpy.zeros(10), numpy.ones(10)) == (0.0, ())
