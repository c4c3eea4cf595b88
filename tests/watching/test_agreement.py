"""When ranks measure together and when they stop: decided from the sums of what all of them say."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diag.watching.measure.over_ranks import OverRanks
from diag.watching.ranks import company
from diag.watching.ranks.agreement import GROUPS_AT_MOST, HEAD, Agreed, Agreement

WANTED = Agreed(True, {"hessian_spectrum": 2.5, "sharpness": float("inf")})
NAMES = ["sharpness", "softmax_collapse", "hessian_spectrum"]


class Link:
    """Rank 0 of two. other: what rank 1 adds to a message, as (ready, how far its count is ahead, lost)."""

    rank, world = 0, 2

    def __init__(self, other=(1.0, 0, 0.0)):
        self.reason, self.other, self.made = "", other, []

    def connect(self, kind):
        self.made.append(kind)

    def group(self, kind):
        return SimpleNamespace(rank=lambda: 0, size=lambda: 2)

    def tell(self, what):
        pass

    told = drop = lambda self, what: ""

    def broke(self, error):
        self.reason = error

    def sum(self, kind, vector):
        ready, ahead, lost = self.other
        if len(vector) > HEAD:
            total = vector + torch.tensor([ready, vector[1] + ahead, lost, *[0.0] * (len(vector) - 3)])
        else:
            total = vector + torch.tensor([lost, vector[1] + ahead])
        return SimpleNamespace(result=lambda: None if self.reason else total)


def agreement(link):
    return Agreement(link, NAMES, torch.device("cpu"))


def test_all_ready_ranks_do_what_rank_0_wants_and_no_time_limit_stays_none():
    for wanted in (WANTED, Agreed(False, WANTED.limits), Agreed(True, {})):
        assert agreement(Link()).settle(True, wanted) == wanted


@pytest.mark.parametrize(("ready", "other"), [(False, 1.0), (True, 0.0)])
def test_where_a_rank_is_not_ready_nothing_is_measured_and_the_next_time_may_be(ready, other):
    link = Link((other, 0, 0.0))
    asked = agreement(link)
    assert asked.settle(ready, WANTED) is None and asked.holds
    link.other = (1.0, 0, 0.0)
    assert asked.settle(True, WANTED) == WANTED


def test_ranks_that_count_differently_stop_and_say_why():
    asked = agreement(Link((1.0, 1, 0.0)))
    assert asked.settle(True, WANTED) is None
    assert not asked.holds and asked.reason == "the ranks do not make the same steps"


def test_ranks_that_lost_each_other_make_a_few_new_groups_and_then_say_why():
    link = Link((0.0, 0, 1.0))
    asked = agreement(link)
    for _ in range(GROUPS_AT_MOST - 1):
        assert asked.settle(True, WANTED) is None and asked.holds
    assert asked.settle(True, WANTED) is None and not asked.holds
    assert asked.reason == "another rank failed in a measurement"
    assert sum(kind.startswith("measuring") for kind in link.made) == GROUPS_AT_MOST


def test_a_measurement_that_broke_off_on_this_rank_ends_the_round():
    asked = agreement(Link())
    assert asked.ended("")
    assert not asked.ended("MemoryError: no room")
    assert asked.together.lost == "MemoryError: no room" and asked.settle(True, WANTED) is None


def test_ranks_ask_each_other_at_scheduled_steps_alone():
    training, measurements = SimpleNamespace(sharded=True), SimpleNamespace(chosen={})
    ranks = OverRanks(training, measurements, None, lambda *_: None, lambda *_: None, last_step=100)
    assert not any(ranks.due(100 + step) for step in range(1, 5))  # they have not met
    ranks.agreement = SimpleNamespace(holds=True)
    asked = [step for step in range(1, 40) if ranks.due(100 + step)]
    assert asked[:3] == [1, 2, 3] and {10, 30} <= set(asked) and len(asked) < 25


def test_ranks_that_cannot_be_reached_are_not_asked(monkeypatch):
    class Silent:
        reason = "rank 1 did not answer"

        def __init__(self, meeting):
            assert meeting.world == 2

        def connect(self, messages):
            pass

    monkeypatch.setattr(company, "Link", Silent)
    model, notes = nn.Linear(2, 1), []
    found = company.Company(model, dict(model.named_parameters()), lambda _, text: notes.append(text), print)
    found._meeting = SimpleNamespace(rank=0, world=2, all_here=lambda: "")
    found.meet()
    assert found.agreement is None and not found.alone
    assert any("rank 1 did not answer" in text for text in notes)


def test_a_rank_follows_through_all_that_was_agreed_until_one_breaks_off():
    done = []
    together = SimpleNamespace(failed="", lost="", deadline=None)
    training = SimpleNamespace(sharded=False, snapshot=lambda ranks: ranks)
    measurements = SimpleNamespace(chosen={}, attempted=lambda name, snapshot: done.append(name))
    ranks = OverRanks(training, measurements, None, print, print)
    for last, expected in ((None, ["a", "b", "c"]), ("b", ["a", "b"])):
        done.clear()
        ended = lambda failed, last=last: done[-1] != last  # noqa: E731
        ranks.agreement = SimpleNamespace(holds=True, together=together, ended=ended)
        ranks.follow(Agreed(False, {"a": 1.0, "b": 1.0, "c": 1.0}))
        assert done == expected
