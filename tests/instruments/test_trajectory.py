"""Distances in the space of functions against closed forms, the Fisher's quadratic form and two runs of a watch."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.instruments.trajectory import trajectory, trajectory_losses
from diag.result import Level

B = torch.tensor([[0.0, 2.0], [1.0, -3.0]], dtype=torch.float64)
A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def binary(z, w):
    """KL of two Bernoulli distributions with log-odds z and w: p (z - w) + softplus(w) - softplus(z)."""
    return 1 / (1 + math.exp(-z)) * (z - w) + math.log1p(math.exp(w)) - math.log1p(math.exp(z))


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_two_classes_have_the_closed_form(temperature):
    """Log-odds 2, -4 before and 1, 1 now, each over the temperature; float64 rounding."""
    found = trajectory(logits=A, previous_logits=B, temperature=temperature)
    expected = [binary(2 / temperature, 1 / temperature), binary(-4 / temperature, 1 / temperature)]
    assert found.trajectory_loss == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert found.trust_distance == pytest.approx((binary(2, 1) + binary(-4, 1)) / 2, rel=1e-12)
    assert found.changed == 0.5 and found.verdict().level == Level.DESCRIPTION
    assert "50 % of the decisions changed" in found.verdict().sentence


def test_it_is_torchs_divergence():
    before, now = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(0))
    found = trajectory(logits=now, previous_logits=before)
    expected = F.kl_div(
        (now / 5).log_softmax(1), (before / 5).log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found.trajectory_loss == pytest.approx(float(expected), rel=1e-5)  # float32


def test_a_constant_added_to_a_row_and_no_step_are_no_distance():
    assert trajectory(logits=B, previous_logits=B).trust_distance == 0
    assert trajectory(logits=B + 3, previous_logits=B).trajectory_loss == pytest.approx(0, abs=1e-15)


def test_a_class_ruled_out_adds_nothing():
    masked = torch.cat([B, torch.full((2, 1), -torch.inf)], 1)
    found = trajectory(logits=torch.cat([A, torch.full((2, 1), -torch.inf)], 1), previous_logits=masked)
    assert found.trust_distance == pytest.approx(trajectory(logits=A, previous_logits=B).trust_distance)


def test_a_small_step_has_half_the_fishers_quadratic_form():
    """KL(theta || theta + d) = 1/2 d^T F d + O(|d|^3): with |d| of 1e-3 of the weights, within 1 %; the Fisher of a
    linear softmax is the mean of x x^T times diag(p) - p p^T, dense in float64."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(50, 4).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    d = 1e-3 * torch.randn(3, 4).double()
    p = model(x).softmax(1).detach()
    fisher = torch.einsum("nij,nk,nl->ikjl", torch.diag_embed(p) - p[:, :, None] * p[:, None, :], x, x) / len(x)
    expected = float(torch.einsum("ik,ikjl,jl->", d, fisher, d)) / 2
    with torch.no_grad():
        model.weight += d
    given = diag.Snapshot(model, F.cross_entropy, (x, torch.arange(50) % 3), previous=before)
    assert trajectory(given).trust_distance == pytest.approx(expected, rel=0.01)


def test_a_watch_compares_measurements_of_its_probe_set():
    """The last measurement's trajectory loss is that of the model's own logits at both steps, kept by the loop."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(20, 5), torch.arange(20) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    outputs = {}
    watcher = diag.watch(
        model, loss_fn=F.cross_entropy, probe=[(x, y)], instruments=["trajectory"], budget=math.inf, every=4
    )
    with watcher:
        for step in range(1, 13):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            outputs[step] = model(x).detach()
    series = watcher.run.series("trajectory")
    found = trajectory_losses(series)
    assert len(found) == len(series) - 1 >= 1
    for began, ended, value in found:
        own = trajectory(logits=outputs[ended], previous_logits=outputs[began])
        assert value == pytest.approx(own.trajectory_loss, rel=1e-5)
    assert f"From step {found[-1][0]:,} to {found[-1][1]:,}" in type(series[-1][1]).trend(series).sentence


def test_each_measurement_is_compared_with_the_one_so_many_before_it():
    """Of four measurements the fourth is of other rows, and has none to be compared with."""
    series = [(step, trajectory(logits=step * B, back=2)) for step in (1, 2, 5)]
    series.append((9, trajectory(logits=B[:1], back=2)))
    (found,) = trajectory_losses(series)
    assert found[:2] == (1, 5)
    assert found[2] == pytest.approx(trajectory(logits=5 * B, previous_logits=B).trajectory_loss, rel=1e-6)


def test_what_a_result_keeps_is_bounded():
    z = torch.randn(100, 5000)
    assert trajectory(logits=z).kept.shape == (13, 5000)  # 65,536 numbers
    assert numpy.array_equal(trajectory(logits=z).kept, z[:13].numpy())


def test_refusals():
    assert trajectory(logits=A).verdict().level == Level.NOT_APPLICABLE
    assert "no earlier snapshot" in trajectory(logits=A).verdict().sentence
    with pytest.raises(InvalidInput, match="expected equal numbers"):
        trajectory(logits=A, previous_logits=B[:1])
    with pytest.raises(InvalidInput, match=r"temperature takes a number above 0 .* and not 0\.0"):
        trajectory(logits=A, temperature=0.0)
