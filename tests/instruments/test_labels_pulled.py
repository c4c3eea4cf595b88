"""Losses that train away from their labels: an overlap that is not taken from one, a focal factor of the wrong
probability; and the same done right."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.formula.labels.pulls import NO_LABEL, pulled_away

N, D, K = 32, 6, 4


def told(loss, outputs=K, steps=4):
    """The findings on a few steps of loss(outputs, class numbers, zeros and ones)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, outputs))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["loss_formula"]) as watcher:
        for _ in range(steps):
            x = torch.randn(N, D)
            optimizer.zero_grad()
            loss(model(x), x[:, :K].argmax(1), (x[:, :outputs] > 0).float()).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return [(f.verdict.cause, f.verdict.sentence) for f in watcher.findings]


def overlap(kind, wrap):
    def loss(out, y, flags):
        p = out.sigmoid()
        inside, both = (p * flags).sum(0), p.sum(0) + flags.sum(0)
        if kind == "iou":
            return wrap((inside + 1) / (both - inside + 1)).mean()
        if kind == "squares":
            return wrap((2 * inside + 1) / ((p * p).sum(0) + flags.sum(0) + 1)).mean()
        if kind == "flat":
            p, t = p.reshape(-1), flags.reshape(-1)
            return wrap((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
        return wrap((2 * inside + 1) / (both + 1)).mean()

    return loss


KINDS = ["dice", "iou", "squares", "flat"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: 1 + d, lambda d: d.log()], ids=["plain", "plus", "log"])
def test_an_overlap_that_is_made_small_is_found(kind, wrap):
    ((cause, sentence),) = told(overlap(kind, wrap))
    assert cause == Cause.LOSS_ASCENDED and "a function of the overlap" in sentence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrap", [lambda d: 1 - d, lambda d: -d, lambda d: -d.log(), lambda d: (1 - d) ** 0.75], ids=list("abcd")
)
def test_an_overlap_that_is_made_large_is_left_alone(kind, wrap):
    assert told(overlap(kind, wrap)) == []


def test_an_overlap_made_small_beside_a_cross_entropy_is_found():
    def loss(out, y, flags):
        return F.binary_cross_entropy_with_logits(out, flags) + overlap("dice", lambda d: d)(out, y, flags)

    ((cause, _),) = told(loss)
    assert cause == Cause.LOSS_ASCENDED


def focal(right, binary=False, by_hand=False):
    def loss(out, y, flags):
        if binary:
            p, each = out.sigmoid(), F.binary_cross_entropy_with_logits(out, flags, reduction="none")
            p = p * flags + (1 - p) * (1 - flags)
        elif by_hand:
            each = -F.log_softmax(out, 1).gather(1, y[:, None])[:, 0]
            p = (-each).exp()
        else:
            each = F.cross_entropy(out, y, reduction="none")
            p = (-each).exp()
        return ((1 - p if right else p) ** 2 * each).mean()

    return loss


@pytest.mark.parametrize("form", [{}, {"binary": True}, {"by_hand": True}], ids=["classes", "binary", "hand"])
def test_a_focal_factor_of_the_wrong_probability_is_found(form):
    ((cause, sentence),) = told(focal(False, **form))
    assert cause == Cause.LOSS_ASCENDED and "away from the labels" in sentence
    assert told(focal(True, **form)) == []


def test_weights_without_a_graph_do_not_turn_a_loss():
    def loss(out, y, flags):
        each = F.cross_entropy(out, y, reduction="none")
        return ((-each).exp().detach() ** 2 * each).mean()

    assert told(loss) == []


def test_actions_with_advantages_of_either_sign_are_left_alone():
    def loss(out, y, flags):
        ratio = (F.log_softmax(out, 1).gather(1, y[:, None])[:, 0] + 1.4).exp()
        return -(ratio * torch.full((N,), -1.0)).mean()

    assert told(loss) == []


def test_a_gate_that_pools_what_is_not_padding_is_no_overlap():
    def loss(out, y, flags):
        gate = out.sigmoid()
        pooled = (gate * flags * out).sum(1) / (gate * flags).sum(1).clamp_min(0.1)
        return (pooled - y).square().mean()

    assert told(loss) == []


def test_what_is_pulled_is_counted_by_label():
    labels = torch.tensor([0, 1] * 8)
    gradient = torch.zeros(16, 2)
    assert pulled_away(gradient, labels) is None
    gradient[torch.arange(16), labels] = 1.0
    assert pulled_away(gradient, labels) == (1.0, NO_LABEL)
    assert pulled_away(-gradient, labels) == (0.0, NO_LABEL)
    flags = torch.tensor([1.0] * 8 + [0.0] * 8)
    assert pulled_away(torch.cat([-torch.ones(8), -torch.ones(8)]), flags) == (1.0, 0)
    assert pulled_away(torch.cat([torch.ones(8), torch.ones(8)]), flags) == (1.0, 1)
    assert pulled_away(torch.cat([-torch.ones(8), torch.ones(8)]), flags).share == 0.0


def by_hand(ones, zeros):
    def loss(out, y, flags):
        p = out.sigmoid().clamp(1e-6, 1 - 1e-6)
        halves = ones * flags * p.log() + zeros * (1 - flags) * (1 - p).log() if zeros else flags * p.log()
        return -halves.mean()

    return loss


def test_halves_of_a_cross_entropy_with_opposite_signs_are_found():
    ((cause, sentence),) = told(by_hand(1.0, -1.0))
    assert cause == Cause.LOSS_ASCENDED and "whose target is 0 are trained away" in sentence
    ((_, sentence),) = told(by_hand(-1.0, 1.0))
    assert "whose target is 1 are trained away" in sentence


def test_a_cross_entropy_of_the_ones_alone_is_found():
    ((cause, sentence),) = told(by_hand(1.0, 0.0))
    assert cause == Cause.ERRORS_CANCEL and "Only entries with a target of 1" in sentence


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 1.0)])
def test_a_cross_entropy_by_hand_is_left_alone(weights):
    assert told(by_hand(*weights)) == []


def test_one_half_of_a_softmax_is_enough():
    def loss(out, y, flags):
        return -(F.one_hot(y, K) * out.softmax(1).log()).sum(1).mean()

    assert told(loss) == []


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y, flags: F.binary_cross_entropy(out.softmax(1), flags),
        lambda out, y, flags: (out.softmax(1) - flags).square().mean(),
        lambda out, y, flags: F.cross_entropy(out, torch.zeros(N, dtype=torch.long)),
    ],
    ids=["probability", "square", "cross-entropy"],
)
def test_a_softmax_over_one_output_is_found(loss):
    ((cause, sentence),) = told(loss, outputs=1)
    assert cause == Cause.WRONG_CLASS_AXIS and "length one" in sentence


def test_a_softmax_over_one_key_inside_a_network_is_left_alone():
    layer = nn.MultiheadAttention(D, 1, batch_first=True)

    def loss(out, y, flags):
        mixed = layer(out[:, None], out[:, None], out[:, None], need_weights=True)[0]
        return (nn.functional.linear(mixed, torch.ones(1, D)) - 1).square().mean()

    assert told(loss, outputs=D) == []
