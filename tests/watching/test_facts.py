"""The small functions by which a watch reads a loop, on graphs and modules that are written down."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.watching.observe.loop.chance import drops_always
from diag.watching.observe.loop.data import asked
from diag.watching.observe.loop.formula.arithmetic import Arithmetic
from diag.watching.observe.loop.losses import Losses, expands_both
from diag.watching.observe.loop.modes import is_trained
from diag.watching.observe.loop.moment import Counter, Moment
from diag.watching.observe.loop.order import compressed
from diag.watching.observe.loop.roots import LossInRoot, undivided
from diag.watching.observe.loop.rows import identity
from diag.watching.observe.loop.weights import Weights
from diag.watching.observe.route import chain_of
from diag.watching.observe.terms import terms_of


def test_a_miss_ends_a_row_of_hits():
    counter = Counter()
    for step, hit in enumerate("hhhmhmmhh", 1):
        counter.hit(step) if hit == "h" else counter.miss()
    tally = counter.tally()
    assert (tally.times, tally.first, tally.last) == (6, 1, 9) and (tally.running, tally.longest) == (2, 3)


@pytest.mark.parametrize(
    ("a", "b", "both"),
    [((4, 1), (4,), True), ((4, 1), (4, 1), False), ((4, 3), (3,), False), ((2, 3), (4,), False)],
)
def test_both_are_expanded_only_where_the_result_is_larger_than_either(a, b, both):
    assert expands_both(torch.zeros(a), torch.zeros(b)) is both


def test_a_layer_without_parameters_is_trained_where_what_is_around_it_is():
    part = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    modules = dict(nn.Sequential(part, nn.Linear(2, 2)).named_modules())
    assert is_trained("0.1", modules)
    part.requires_grad_(False)
    assert not is_trained("0.1", modules)
    assert not is_trained("dropout", dict(nn.Sequential(nn.Dropout()).named_modules()))


def test_a_plain_mean_is_multiplied_by_numbers_alone():
    losses = torch.ones(4, requires_grad=True).exp()
    number, weights = losses.grad_fn._sequence_nr(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert all(LossInRoot(root, number).is_plain_mean for root in (losses.mean(), 2.0 * losses.mean() / 3.0))
    others = (losses * weights).mean(), losses.sum(), losses.mean().sqrt()
    assert not any(LossInRoot(root, number).is_plain_mean for root in others)


def test_how_the_value_of_a_loss_enters_a_sum():
    """Against the derivative of the root with respect to the value."""
    x = torch.tensor(0.3, requires_grad=True)
    value, penalty = x.exp(), (x * torch.tensor([1.0, 2.0])).pow(2)
    number = value.grad_fn._sequence_nr()
    alone = value, -value / 4, 2 * (value.reshape(1) - 3).sum(), torch.stack([value, torch.ones(())]).mean()
    for root in alone:
        (slope,) = torch.autograd.grad(root, value, retain_graph=True)
        found = LossInRoot(root, number)
        assert found.factor == pytest.approx(float(slope)) and found.ascends is (float(slope) < 0)
    for root in (penalty.sum() - value, 2 * penalty.mean() - value / 3, -(value + penalty).mean()):
        found = LossInRoot(root, number)
        assert found.factor is None and found.ascends
    for root in (penalty.sum() + value, value.sqrt(), -value.sqrt(), (penalty * -value).sum()):
        found = LossInRoot(root, number)
        assert found.factor is None and not found.ascends
    each = torch.ones(2, requires_grad=True).exp()
    weighted = LossInRoot((each * torch.tensor([-3.0, 1.0])).sum(), each.grad_fn._sequence_nr())
    assert weighted.factor is None and not weighted.ascends  # weights of examples, as of advantages, have any sign


def test_a_mean_is_divided_where_its_factor_is_below_one():
    losses = torch.ones(8, requires_grad=True).exp()
    means = losses.mean(), -losses.mean(), losses.sum() / 8, losses.mean() + 0.1 * losses.pow(2).sum()
    assert all(undivided(root) is True for root in means)
    assert undivided(losses.mean() / 4) is undivided((losses.mean() / 4) + 0.1 * losses.pow(2).mean()) is False
    assert undivided(losses.sum()) is None


def test_the_terms_of_a_mean_of_numbers_are_those_with_a_graph():
    a, b = (torch.tensor(x, requires_grad=True).exp() for x in (1.0, 2.0))
    known = {a.grad_fn._sequence_nr(), b.grad_fn._sequence_nr()}
    found = {term.number: term.factors for term in terms_of(torch.stack([a, 3.0 * b]).mean(), known)}
    assert found == {a.grad_fn._sequence_nr(): (0.5,), b.grad_fn._sequence_nr(): (0.5, 3.0)}


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, 1:],
        lambda x: x[:, :4],
        lambda x: x[..., :1],
        lambda x: x[..., 1:3],
        lambda x: x[:, 0],
        lambda x: x[..., -1],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1),
    ],
)
def test_a_step_of_the_way_from_outputs_to_the_loss_is_repeated_on_others(cut):
    outputs = torch.ones(3, 6, 4, requires_grad=True).exp()
    others, step = torch.randn(5, 6, 4), chain_of(cut(outputs))[0].step
    assert step is not None and torch.equal(step(others), cut(others))


def test_an_order_repeated_up_to_the_end_is_written_once():
    assert [compressed(letters) for letters in ("DFBDFB", "DFBDFBSZ", "FFFS", "DFB")] == [
        "(DFB)2",
        "(DFB)2SZ",
        "F3S",
        "DFB",
    ]


def test_only_dropout_that_does_not_ask_the_mode_always_drops():
    class Plain(nn.Module):
        def forward(self, x):
            return F.relu(self.dropout(x))

    class Asks(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    class Drops(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5)

    assert [drops_always(kind) for kind in (Plain, Asks, Drops)] == [False, False, True]


def test_inputs_are_taken_to_be_new_once_so_many_rows_came_and_none_again(monkeypatch):
    monkeypatch.setattr(identity, "UNSEEN_AFTER", 4)
    for rows, reason in (([0, 1, 2, 3], ""), ([0, 1, 2, 3, 4], identity.NOT_AGAIN), ([0, 1, 2, 3, 0], "")):
        known = identity.Hashes()
        known.rows(numpy.asarray(rows))
        assert known.reason == reason


def test_the_inputs_of_the_first_calls_are_all_compared_with_their_targets():
    demands = asked.Demands(Moment())
    for _ in range(asked.INPUTS_LOOKED_AT):
        inputs = torch.randn(8, 3)
        demands.training_call((inputs,), {})
        demands.loss_called("mse_loss", (torch.zeros(8, requires_grad=True) * 2, 2 * inputs[:, 1] + 1), {})
    (facts,) = demands.facts()
    assert facts.copied_looks == facts.looked == asked.INPUTS_LOOKED_AT and facts.copied == 1


def test_a_loss_of_the_users_own_arithmetic_is_among_the_facts():
    model = nn.Linear(2, 1)
    losses = Losses(model, Moment())
    assert losses.facts() == ()
    root = (model(torch.randn(4, 2)) - torch.randn(4)).square().mean()
    losses.backward_called(root)
    (facts,) = losses.facts()
    assert (facts.function, facts.calls) == ("", 1)
    arithmetic = Arithmetic(Moment())
    arithmetic.backward_called(root)
    assert [(e.shape, e.other) for e in arithmetic.facts().expanded] == [((4, 1), (4,))]


def test_the_share_of_a_step_that_is_taken_back_is_of_one_step():
    """Where the steps before were not looked at closely it is not known how the weights were before it."""
    moment = Moment()
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    weights = Weights(parameters, {id(p): str(i) for i, p in enumerate(parameters)}, moment)
    for step in range(1, 80):
        weights.training_call()
        with torch.no_grad():
            for p in parameters:
                p.add_(1.0)
        weights.stepped()
        if step in (65, 67):  # the first of four steps, and the third
            with torch.no_grad():
                for p in parameters[2 if step == 65 else 0 :]:
                    p.sub_(0.25)
        moment.ended(step)
    assert [change.step for change in weights.facts()] == [66, 68]
    assert weights.taken_back == (0.25,)
