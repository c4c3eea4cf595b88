"""Running statistics that hardly move are told where they do not fit; measured against the data's own variance."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.network.normalization_statistics import NormalizationStatistics


def measured(momentum, batches=100, size=8.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=momentum), nn.Flatten(), nn.Linear(96, 3))
    x = size * torch.randn(64, 1, 6, 6)
    model.train()
    for _ in range(batches):
        model(x)
    snapshot = diag.Snapshot(model, F.cross_entropy, (x, torch.zeros(64).long()), micro_batch=16)
    return model, x, snapshot, diag.normalization_statistics(snapshot)


def test_the_numbers_are_those_of_the_data():
    model, x, snapshot, result = measured(1e-4)
    (found,) = snapshot.quantity("running_statistics")
    h = model[0](x).detach().double()
    ratio = h.var((0, 2, 3), correction=0) / model[1].running_var.double()
    assert found.factor == pytest.approx(float(ratio.log().abs().median().exp()), rel=1e-4)
    assert result.unseen == pytest.approx((1 - 1e-4) ** 100) and result.layer == "1"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("momentum", "size", "step", "cause"),
    [
        (1e-4, 8.0, 100, Cause.NORMALIZATION_STATISTICS_BAD),
        (1e-4, 8.0, 10, ""),  # it is early
        (1e-4, 1.7, 100, ""),  # of the size that they began with: 1.7 * .58 = 1
        (0.1, 8.0, 100, ""),
        (0.02, 8.0, 100, ""),
        (None, 8.0, 100, ""),  # plain averages
    ],
)
def test_statistics_that_hardly_move_and_do_not_fit(momentum, size, step, cause):
    verdict = NormalizationStatistics.trend([(step, measured(momentum, size=size)[-1])])
    assert verdict.cause == cause


@pytest.mark.parametrize(
    ("momentum", "size", "batches", "told"),
    [
        (0.0, 8.0, 100, True),
        (0.0, 8.0, 3, False),  # it is early
        (0.0, 8.0, 10, True),
        (0.0, 1.7, 100, False),  # of the size that they began with
        (0.1, 8.0, 100, False),
    ],
)
def test_statistics_that_never_move_are_told(momentum, size, batches, told):
    result = measured(momentum, batches, size)[-1]
    verdict = NormalizationStatistics.trend([(batches, result)])
    assert (verdict.cause == Cause.NORMALIZATION_STATISTICS_BAD) == told
    assert ("never move" in verdict.sentence) == told
    off = r"variance \S+ times as large or as small\.|means that are \S+ away from 0\."
    assert bool(re.search(off, verdict.sentence)) == told


def test_pretrained_statistics_that_are_kept_by_a_momentum_of_zero_are_left_alone():
    model, x, _, _ = measured(0.1)
    model[1].momentum = 0.0
    snapshot = diag.Snapshot(model, F.cross_entropy, (x, torch.zeros(64).long()), micro_batch=16)
    assert NormalizationStatistics.trend([(100, diag.normalization_statistics(snapshot))]).level == "ok"


def test_a_model_without_running_statistics_is_refused():
    snapshot = diag.Snapshot(nn.Linear(4, 3), F.cross_entropy, (torch.randn(6, 4), torch.zeros(6).long()))
    with pytest.raises(diag.errors.MissingQuantity, match="no batch normalisation"):
        snapshot.quantity("running_statistics")
