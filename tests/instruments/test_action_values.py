"""Values of actions: is the one that is corrected that of the action that was taken?"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.arithmetic import ActionFacts, ActionLook
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.formula.parts import parts_of
from diag.watching.observe.loop.formula.rewards.actions import picked_in

N, D, A = 32, 5, 3


def values():
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, A))


def by_gather(q, actions):
    return q.gather(1, actions[:, None]).squeeze(1)


def by_gather_and_column(q, actions):
    return q.gather(1, actions[:, None])[:, 0]


def by_index(q, actions):
    return q[torch.arange(N), actions]


def the_largest(q, actions):
    return q.max(1).values


def amax(q, actions):
    return q.amax(dim=-1)


def squared(a, b):
    return (a - b).pow(2).mean()


def told(pick, compare=F.smooth_l1_loss, act=True, steps=12):
    torch.manual_seed(0)
    model, target = values(), values()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with diag.watch(model, instruments=["action_values"]) as watcher:
        for _ in range(steps):
            with torch.no_grad():
                if act:
                    model(torch.randn(1, D)).argmax()
                following = target(torch.randn(N, D)).max(1).values
            optimizer.zero_grad()
            chosen = pick(model(torch.randn(N, D)), torch.randint(A, (N,)))
            compare(chosen, torch.rand(N) + 0.9 * following).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


COMPARE = pytest.mark.parametrize("compare", [F.smooth_l1_loss, F.mse_loss, F.huber_loss, squared])


@COMPARE
@pytest.mark.parametrize("pick", [the_largest, amax])
def test_the_largest_value_instead_of_the_action_taken_is_named(pick, compare):
    (finding,) = told(pick, compare)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.ACTION_NOT_TAKEN)
    assert finding.first_step <= 3


@COMPARE
@pytest.mark.parametrize("pick", [by_gather, by_index])
def test_the_value_of_an_action_that_an_index_gives_is_fine(pick, compare):
    assert not told(pick, compare)


def test_a_regression_of_the_largest_output_without_anyone_who_acts_is_fine():
    """The maximum of several affine functions, fitted to numbers."""
    assert not told(the_largest, act=False)


@pytest.mark.parametrize(
    "pick, found",
    [
        (by_gather, "Gather"),
        (by_gather_and_column, "Gather"),
        (by_index, "Index"),
        (the_largest, "Max"),
        (amax, "Amax"),
    ],
)
def test_what_picks_is_read(pick, found):
    q, actions = values()(torch.randn(N, D)), torch.randint(A, (N,))
    (part,) = parts_of(F.mse_loss(pick(q, actions), torch.zeros(N)))
    assert picked_in(part).kind == found
    (part,) = parts_of(F.mse_loss(q, torch.zeros(N, A)))
    assert picked_in(part) is None
    (part,) = parts_of(F.mse_loss(q.max(0).values, torch.zeros(A)))
    assert picked_in(part) is None


def test_too_few_looks_and_a_look_at_an_index_are_no_finding():
    def judged(*looks):
        return diag.action_values(loop=Loop(9, actions=ActionFacts(looks))).verdict().level

    found = ActionLook(1, True, True)
    assert judged(found, found, found) == "warning" and judged(found, found) == "ok"
    assert judged(found, found, found, ActionLook(2, False, True)) == "ok"
    assert judged() == "not_applicable"


def test_values_that_no_index_gives_are_not_said_to_be_given_by_one():
    looks = tuple(ActionLook(k, k > 1, False) for k in (1, 2, 3))
    assert (
        "an index gives at 1 of 3"
        in diag.action_values(loop=Loop(9, actions=ActionFacts(looks))).verdict().sentence
    )
