"""Policy gradients: their sign, what reaches the policy, and what drowns it."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.arithmetic import PolicyFacts, PolicyLook
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.formula.parts import parts_of
from diag.watching.observe.loop.formula.rewards.policy import policy_look

N, D, A = 48, 4, 3


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.policy, self.value = (
            nn.Sequential(nn.Linear(D, 16), nn.Tanh()),
            nn.Linear(16, A),
            nn.Linear(16, 1),
        )

    def forward(self, x):
        h = self.trunk(x)
        return self.policy(h), self.value(h)[:, 0]


def terms(model, calls=1):
    """One step of bandits: log-probabilities, entropy, values and returns, from one call or stacked from
    several."""
    kept = []
    for _ in range(calls):
        x = torch.randn(N, D)
        logits, value = model(x)
        policy = Categorical(logits=logits)
        action = policy.sample()
        reward = (action == x[:, :A].argmax(1)).float() + 0.1 * torch.randn(N)
        kept.append((policy.log_prob(action), policy.entropy(), value, reward))
    return [torch.stack(t) if calls > 1 else t[0] for t in zip(*kept, strict=True)]


def actor_critic(sign=1.0, critic=0.5, entropy=0.01, detach=False, masked=False):
    def loss(logp, h, value, reward):
        advantage = (reward - value).detach()
        advantage = (advantage - advantage.mean()) / advantage.std()
        mask = (torch.rand_like(reward) > 0.2).float() if masked else torch.ones_like(reward)
        logp = logp.detach() if detach else logp
        policy = -sign * (logp * advantage * mask).sum() / mask.sum()
        return policy + critic * ((value - reward) ** 2 * mask).mean() - entropy * (h * mask).sum() / mask.sum()

    return loss


def told(loss, calls=1, steps=8):
    torch.manual_seed(0)
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["policy_loss"]) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(*terms(model, calls)).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


CALLS = pytest.mark.parametrize("calls", [1, 4], ids=["one call", "an episode of calls"])


@CALLS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_wrong_sign_is_named_within_three_steps(calls, masked):
    (finding,) = told(actor_critic(-1.0, masked=masked), calls)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.LOSS_ASCENDED)
    assert finding.first_step <= 3


@CALLS
def test_log_probabilities_without_a_gradient_are_named(calls):
    (finding,) = told(actor_critic(detach=True), calls)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.GRAPH_CUT)


@CALLS
def test_an_entropy_that_keeps_the_policy_even_is_named(calls):
    (finding,) = told(actor_critic(entropy=10.0), calls, steps=160)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.LOSS_TERM_DOMINATES)
    assert "entropy" in finding.verdict.sentence


def test_a_critic_that_drowns_the_policy_is_named():
    (finding,) = told(actor_critic(critic=1e5))
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.LOSS_TERM_DOMINATES)
    assert "critic" in finding.verdict.sentence


def alike(entropy):
    """Advantages that are all zero, as of returns that are all equal."""

    def loss(logp, h, value, reward):
        return -(logp * (reward - reward)).mean() + 0.5 * (value - reward).square().mean() - entropy * h.mean()

    return loss


@pytest.mark.parametrize("entropy", [0.01, 0.0], ids=["an entropy bonus", "a critic alone"])
def test_advantages_that_are_all_zero_are_named_as_such(entropy):
    (finding,) = told(alike(entropy), steps=110)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.TARGETS_ALL_EQUAL)
    assert finding.verdict.sentence.startswith("No action is told from another: at the last 5 backward passes")


def test_a_reward_that_is_yet_to_be_found_at_the_first_steps_is_no_finding():
    assert not told(alike(0.01), steps=12)


def test_looks_at_which_no_action_counted_do_not_make_the_others_factor_infinite():
    looks = [PolicyLook(step, math.nan, 0.999, ratio, True, True, math.nan, None) for step, ratio in
             ((10, math.inf), (30, 4.0), (60, math.inf), (90, 4.0), (99, math.inf))]  # fmt: skip
    verdict = judged(*looks)
    assert verdict.cause == Cause.LOSS_TERM_DOMINATES and "its factor is 4 times" in verdict.sentence


def smooth(logp, h, value, reward):
    return -(logp * (reward - value).detach()).mean() + F.smooth_l1_loss(value, reward) - 0.01 * h.mean()


def by_product(logp, h, value, reward):
    error = value - reward
    return (logp * error.detach()).mean() + (error * error).mean() - 0.01 * h.mean()


def without_a_critic(logp, h, value, reward):
    return -(logp * (reward - reward.mean())).mean() + 0 * value.mean()


@CALLS
@pytest.mark.parametrize(
    "loss",
    [actor_critic(), actor_critic(masked=True), actor_critic(entropy=0.3), smooth, by_product, without_a_critic],
)
def test_policy_gradients_that_work_are_fine(loss, calls):
    assert not told(loss, calls, steps=60)


def test_the_entropy_and_the_agreement_are_those_of_the_policy():
    """Of an advantage that is the return less the value the agreement is one; the entropy is that of torch."""
    torch.manual_seed(0)
    logp, h, value, reward = terms(ActorCritic())
    policy = -(logp * (reward - value).detach()).mean()
    look = policy_look(parts_of(policy + (reward - value).square().mean() - 0.25 * h.mean()), 7)
    assert look.agreement == pytest.approx(1.0, abs=1e-6) and look.bonus and look.rewarded and look.shared
    assert look.entropy == pytest.approx(h.mean().item() / torch.log(torch.tensor(float(A))).item(), rel=1e-5)
    size = (reward - value).detach().abs().mean().item()
    assert look.entropy_over_actions == pytest.approx(0.25 / size, rel=1e-5)
    # The derivative by the values is 2 (v - r) / n, that by the log-probabilities (v - r) / n.
    assert look.critic_over_actions == pytest.approx(2.0, rel=1e-5)


def test_a_square_written_as_a_product_is_a_critic():
    torch.manual_seed(0)
    logp, h, value, reward = terms(ActorCritic())
    look = policy_look(parts_of(by_product(logp, h, value, reward)), 7)
    assert look.agreement == pytest.approx(1.0, abs=1e-6)
    assert look.critic_over_actions == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    "critic",
    [F.smooth_l1_loss, partial(F.smooth_l1_loss, beta=30.0), F.huber_loss, partial(F.huber_loss, delta=5.0),
     partial(F.smooth_l1_loss, reduction="sum"), F.mse_loss],
)  # fmt: skip
def test_what_the_critic_weighs_is_its_derivative(critic):
    """Returns of hundreds: the linear losses do not grow with them."""
    torch.manual_seed(0)
    logp, _, value, reward = terms(ActorCritic())
    reward = 100 * reward
    loss = -(logp * torch.randn(N)).mean() + critic(value, reward)
    by_value, by_action = torch.autograd.grad(loss, (value, logp), retain_graph=True)
    look = policy_look(parts_of(loss), 7)
    assert look.critic_over_actions == pytest.approx(float(by_value.norm() / by_action.norm()), rel=1e-5)


def test_where_no_action_counts_the_ratios_are_infinite():
    torch.manual_seed(0)
    look = policy_look(parts_of(alike(0.01)(*terms(ActorCritic()))), 7)
    assert look.entropy_over_actions == look.critic_over_actions == math.inf


def test_layers_of_their_own_are_told_apart():
    policy, critic, x = nn.Linear(D, A), nn.Linear(D, 1), torch.randn(N, D)
    logp, value = policy(x).log_softmax(1).gather(1, torch.zeros(N, 1, dtype=torch.long)), critic(x)
    loss = (logp * torch.randn(N, 1)).mean() + (value - torch.randn(N, 1)).square().mean()
    assert policy_look(parts_of(loss), 1).shared is False


def test_a_classifier_is_no_policy():
    logits, labels = nn.Linear(D, A)(torch.randn(N, D)), torch.zeros(N, 1, dtype=torch.long)
    assert policy_look(parts_of(F.cross_entropy(logits, labels[:, 0])), 1) is None
    assert policy_look(parts_of(-logits.log_softmax(1).gather(1, labels).mean()), 1) is None


def judged(*looks):
    return diag.policy_loss(loop=Loop(100, policy=PolicyFacts(looks))).verdict()


def rollouts(
    redraw=False, squash=False, discount=0.9, reward=1.0, steps=60, watched=("policy_loss",), shuffled=False
):
    """An actor-critic on rollouts of 8 by 16 states, without gradients, then one update on all of them."""
    torch.manual_seed(0)
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def policy(x):
        logits, value = model(x)
        return Categorical(logits=logits.sigmoid() if squash else logits), value

    with diag.watch(model, instruments=list(watched)) as watcher:
        for _ in range(steps):
            with torch.no_grad():
                states = [torch.randn(16, D) for _ in range(8)]
                actions = torch.cat([policy(s)[0].sample() for s in states])
            states = torch.cat(states)
            gains = torch.full((128,), reward) if discount == 0 else reward * torch.rand(8, 16).cumsum(0).flatten()
            if shuffled:
                order = torch.randperm(128)
                states, actions, gains = states[order], actions[order], gains[order]
            now, value = policy(states)
            logp = now.log_prob(now.sample() if redraw else actions)
            loss = (
                -(logp * (gains - value).detach()).mean()
                + (value - gains).pow(2).mean()
                - 0.01 * now.entropy().mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


@pytest.mark.parametrize("how", [{}, {"discount": 0, "reward": 0.0}, {"shuffled": True}])
def test_rollouts_that_work_are_fine(how):
    """Also where no reward has been found yet."""
    assert not rollouts(**how)


def test_freshly_drawn_actions_are_named_within_three_steps():
    (finding,) = rollouts(redraw=True)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.ACTION_NOT_TAKEN)
    assert finding.first_step <= 3


def test_actions_that_are_drawn_and_rewarded_in_the_training_call_are_fine():
    """A bandit: nothing was done before the call, so that its actions are those that were taken."""
    assert not told(actor_critic(), steps=60)


def test_logits_that_a_sigmoid_gave_are_named():
    (finding,) = rollouts(squash=True)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.OUTPUT_RANGE)
    most = math.e / (math.e + A - 1)
    assert f"above {100 * most:.1f} %" in finding.verdict.sentence


def test_one_return_for_all_states_is_named():
    (finding,) = rollouts(discount=0, reward=0.1)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.TARGETS_ALL_EQUAL)
    assert "0.1 at step" in finding.verdict.sentence


def test_one_look_that_agrees_and_too_few_looks_are_no_finding():
    against = PolicyLook(1, -1.0, 0.9, 0.01, True, True, 1.0, True)
    agreeing = PolicyLook(2, 0.2, 0.9, 0.01, True, True, 1.0, True)
    assert judged(against, against, against).level == "warning"
    assert judged(against, against).level == judged(against, against, agreeing).level == "ok"
    assert judged().level == "not_applicable"
