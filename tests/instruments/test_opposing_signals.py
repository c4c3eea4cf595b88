"""Opposing signals: the scalar oracle, planted groups on real digits, and data without any."""

import dataclasses
import functools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag import datasets
from diag.errors import InvalidInput, Unsupported
from diag.instruments.opposing_signals.instrument import opposing_signals_online
from diag.instruments.opposing_signals.showing import displayed, imported
from diag.linalg.lanczos import eigenpairs
from diag.result import Level
from diag.testing import refusal

opposing = diag.opposing_signals


# Oracle 2a: f = w s, half of the labels +1 and half -1, loss 1/2 (f - y)^2, so H = s^2.


def scalar_record(product, steps=12, n=80):
    """Losses of gradient descent at learning rate `product` / s^2; w = 0 is the minimum."""
    s, y = 2.0, torch.ones(n, dtype=torch.float64)
    y[n // 2 :] = -1
    w, record = 1e-3, []
    for _ in range(steps + 1):
        record.append(0.5 * (w * s - y) ** 2)
        w = (1 - product) * w
    return torch.stack(record)


def test_two_groups_alternate_above_one():
    result = opposing_signals_online(
        scalar_record(1.6), learning_rate=0.4, sharpness=(4.0, 4.0), k=20, edge=(0.5, 1)
    )
    assert result.swap == 1.0 and result.persist == 0.0
    assert result.antiphase < -0.99
    assert set(result.group_a) <= set(range(40)) or set(result.group_a) <= set(range(40, 80))


def test_two_groups_stay_below_one():
    result = opposing_signals_online(
        scalar_record(0.6), learning_rate=0.15, sharpness=(4.0, 4.0), k=20, edge=(0, 0.5)
    )
    assert result.swap == 0.0 and result.persist == 1.0
    assert "hardest and the easiest" in result.verdict().sentence


# Digits with planted groups, and without.


def digits(planted, seed=0):
    data = datasets.load_dataset("digits").shuffled(seed)[slice(0, 1000)]
    x, y = data.inputs.flatten(1), data.labels
    extra = torch.zeros(len(x), 16)
    rows = [(y == c).nonzero().flatten()[:20] for c in (3, 8)]
    if planted:
        extra[torch.cat(rows)] = 6.0
    return torch.cat([x - x.mean(0), extra], 1), y, [set(r.tolist()) for r in rows]


def squared_error(outputs, targets):
    return 0.5 * (outputs - F.one_hot(targets, 10)).square().sum(1).mean()


def descend(model, x, y, lr, steps, losses=None):
    for _ in range(steps):
        outputs = model(x)
        if losses is not None:
            losses.append(0.5 * (outputs.detach() - F.one_hot(y, 10)).square().sum(1))
        gradients = torch.autograd.grad(squared_error(outputs, y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(lr * g)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


@functools.cache
def before_the_edge(planted=True):
    """The planted network stopped at step 130, where learning rate times sharpness is still below 2."""
    x, y, rows = digits(planted)
    model = network()
    descend(model, x, y, lr=0.2, steps=130)
    return diag.Snapshot(model, squared_error, (x, y)), rows


@functools.cache
def planted_static():
    return opposing(before_the_edge()[0], k=20)


def found(result, rows):
    """How many of the planted rows each group holds, whichever way round."""
    a, b = set(result.group_a), set(result.group_b)
    return max(len(a & rows[0]) + len(b & rows[1]), len(a & rows[1]) + len(b & rows[0]))


def test_planted_groups_are_found_before_they_oscillate():
    result, rows = planted_static(), before_the_edge()[1]
    assert found(result, rows) == 40  # 20 of 20 in each group
    assert result.share > 0.7
    assert result.curvature_share > 0.9
    assert result.slope_a * result.slope_b < 0
    verdict = result.verdict()
    assert verdict.level == Level.WARNING and "dominate a sharp direction" in verdict.sentence
    assert verdict.threshold_source == "our choice, uncalibrated"


def test_the_rows_are_shown():
    items = list(planted_static().examples())
    groups = {item["group"] for item in items}
    assert groups == {"A: the loss rises", "B: the loss falls", "mean of A less mean of B"}
    rows = [item for item in items if item["row"] is not None]
    assert len(rows) == 24 and {item["label"] for item in rows} == {3, 8}
    x = before_the_edge()[0].quantity("inputs")
    standardised = (x - x.mean(0)) / x.std(0).clamp_min(1e-12)
    numpy.testing.assert_allclose(rows[0]["features"], standardised[rows[0]["row"]], rtol=1e-4, atol=1e-5)
    assert planted_static().difference.shape == (80,)


def test_the_signed_graph_falls_into_the_two_groups():
    result = planted_static()
    graph = result.graph()
    assert set(graph) == set(result.group_a) | set(result.group_b)
    first, second = result.groups()[:2]
    assert {frozenset(first), frozenset(second)} == {frozenset(result.group_a), frozenset(result.group_b)}
    a, b = int(result.group_a[0]), int(result.group_b[0])
    assert graph.edges[a, b]["weight"] < -0.3


def test_planted_groups_trade_places_in_the_replay():
    snapshot, rows = before_the_edge()
    result = opposing(snapshot, mode="replay", k=20)
    assert found(result, rows) == 40
    assert result.swap > 0.9 and result.antiphase < -0.7 and result.share > 0.7
    verdict = result.verdict()
    assert verdict.level == Level.WARNING and "trade places" in verdict.sentence
    assert "mean loss jumps" not in verdict.sentence  # the replay made the spike itself


def test_natural_digits_stay_quiet():
    snapshot, _ = before_the_edge(planted=False)
    result = opposing(snapshot)
    assert result.share < 0.25
    verdict = result.verdict()
    assert verdict.level == Level.OK and "stand out" in verdict.sentence


@functools.cache
def online(planted, lr, start, stop):
    x, y, rows = digits(planted)
    model, record = network(), []
    descend(model, x, y, lr, start)
    before = sharpness(model, x, y)
    descend(model, x, y, lr, stop - start, record)
    return torch.stack(record).double(), (before, sharpness(model, x, y)), y, rows


def sharpness(model, x, y):
    hessian = diag.Snapshot(model, squared_error, (x, y)).quantity("hessian")
    return float(eigenpairs(hessian, largest=1, tolerance=1e-2, vectors=False).values[0])


def test_planted_groups_online():
    """The window of steps 190 to 290, at the edge of stability (2 / lr = 10)."""
    record, sharp, y, rows = online(True, 0.2, 190, 290)
    result = opposing_signals_online(record, learning_rate=0.2, sharpness=sharp, labels=y, k=20)
    assert found(result, rows) == 40
    assert result.share > 0.7 and result.antiphase < -0.9 and result.lag_one < -0.9
    # From step 260 on, sharpness sits at its threshold and the groups swap at every step.
    record, sharp, y, rows = online(True, 0.2, 260, 300)
    assert min(sharp) > 9.9 and max(sharp) < 10.1
    result = opposing_signals_online(record, learning_rate=0.2, sharpness=sharp, labels=y, k=20)
    assert result.swap > 0.9 and result.verdict().level == Level.WARNING


def test_no_verdict_away_from_the_edge():
    record, sharp, y, *_ = online(True, 0.2, 90, 120)
    verdict = opposing_signals_online(record, learning_rate=0.2, sharpness=sharp, labels=y, k=20).verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "outside 0.95 to 1.5" in verdict.sentence


@pytest.mark.slow
def test_natural_digits_online():
    """At the edge the ends swap, and carry little."""
    record, sharp, y, *_ = online(False, 0.5, 400, 500)
    result = opposing_signals_online(record, learning_rate=0.5, sharpness=sharp, labels=y)
    assert result.share < 0.25
    assert result.verdict().level == Level.OK


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds(seed):
    x, y, rows = digits(True, seed)
    model = network(seed)
    descend(model, x, y, lr=0.2, steps=130)
    result = opposing(diag.Snapshot(model, squared_error, (x, y)), k=20)
    assert found(result, rows) == 40 and result.share > 0.7


# Verdict details, on records made up for them.


def record_of(swapping, outsized, n=200, k=10, spike=False):
    torch.manual_seed(0)
    change = 0.01 * torch.randn(8, n, dtype=torch.float64)
    size = 1.0 if outsized else 0.04
    for t in range(8):
        sign = (-1) ** t if swapping else 1
        change[t, :k] += sign * size
        change[t, k : 2 * k] -= sign * size * (0.2 if spike else 1)
    start = torch.full((1, n), 0.3 if spike else 5.0, dtype=torch.float64)
    return torch.cat([start, start + change.cumsum(0)])


AT_EDGE = {"learning_rate": 1.0, "sharpness": (2.0, 2.1)}


def test_a_spike_is_named_only_with_swap_share_and_labels():
    labels = torch.arange(200) // 10
    spiking = record_of(True, True, spike=True)
    assert "mean loss jumps" in opposing_signals_online(spiking, labels=labels, **AT_EDGE).verdict().sentence
    assert "mean loss jumps" not in opposing_signals_online(spiking, **AT_EDGE).verdict().sentence
    calm = record_of(True, True)
    assert "mean loss jumps" not in opposing_signals_online(calm, labels=labels, **AT_EDGE).verdict().sentence


def test_levels_of_made_up_records():
    assert opposing_signals_online(record_of(True, True), **AT_EDGE).verdict().level == Level.WARNING
    small = opposing_signals_online(record_of(True, False), **AT_EDGE).verdict()
    assert small.level == Level.OK
    still = opposing_signals_online(record_of(False, True), **AT_EDGE).verdict()
    assert still.level == Level.OK and "not opposing" in still.sentence


def test_a_quiet_end_says_when_it_was_not_quiet():
    loud, quiet = (opposing_signals_online(record_of(True, outsized), **AT_EDGE) for outsized in (True, False))
    verdict = type(loud).trend([(10, loud), (20, quiet)])
    assert verdict.level == Level.OK and verdict.sentence.endswith("; two groups did dominate at step 10.")
    assert type(loud).trend([(10, quiet), (20, loud)]) == loud.verdict()
    assert type(loud).trend([(10, quiet)]) == quiet.verdict()


def test_unknowns_stay_unknown():
    result = opposing_signals_online(record_of(True, True), **AT_EDGE)
    assert math.isnan(result.curvature_share) and math.isnan(result.null_share)
    assert result.labels_a == () and next(iter(result.examples()))["row"] == int(result.group_a[0])


def test_images_and_texts_are_shown_as_such():
    assert set(displayed(numpy.zeros((1, 8, 8)), None)) == {"image"}
    assert displayed(numpy.array([5, 7]), None) == {"text": "5 7"}
    assert displayed(numpy.array([5, 7]), lambda ids: f"{len(ids)} words") == {"text": "2 words"}


def test_texts_are_made_by_a_named_function():
    assert imported("json:dumps")([1]) == "[1]"
    with pytest.raises(InvalidInput, match="give 'module:function'"):
        imported("no.such.module:decode")


def test_refusals():
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    torch.manual_seed(0)
    small = diag.Snapshot(nn.Linear(4, 3), F.cross_entropy, (x, y))
    assert "30 examples are too few for two groups of 10" in refusal(opposing, small)
    assert "expected 'auto', 'static', 'replay' or 'online'" in refusal(opposing, small, mode="kick")
    assert "k is 20 for 30 examples" in refusal(opposing, small, k=20)
    with pytest.raises(InvalidInput, match=r"shape \(3,\)"):
        opposing_signals_online(torch.ones(3), learning_rate=1, sharpness=(2, 2))

    class Concave(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return -self.w.square().sum().expand(len(x), 1) * x

    flat = diag.Snapshot(Concave(), lambda o, t: o.mean(), (torch.ones(60, 1), torch.zeros(60)))
    with pytest.raises(Unsupported, match="curves upwards in no direction"):
        opposing(flat)


def test_groups_stand_out_by_a_margin_over_random_steps():
    """.436 beside .426 after random steps is nothing: the odds must be doubled."""
    result = opposing_signals_online(record_of(True, True), **AT_EDGE)
    beside = dataclasses.replace(result, share=0.436, null_share=0.426, chance_share=0.02)
    assert not beside.outsized and beside.limit == pytest.approx(2 * 0.426 / 1.426)
    assert dataclasses.replace(beside, share=0.7).outsized
    assert dataclasses.replace(beside, null_share=0.05).outsized  # the limit of .4 decides
