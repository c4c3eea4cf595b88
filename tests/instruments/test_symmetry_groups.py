"""The counts are those of the architecture, and the drawing has both axes."""

import math

import pytest
import torch
from torch import nn

import diag
from diag.errors import MissingQuantity, Unsupported
from diag.instruments.symmetry_groups import symmetry_groups
from diag.result import Level
from diag.testing import check_instrument, check_result


def measured(model, *shape):
    return symmetry_groups(
        diag.Snapshot(model.double(), None, (torch.randn(*shape).double(), torch.zeros(shape[0])))
    )


def test_contract():
    check_instrument(symmetry_groups)


def test_counts_of_a_plain_network():
    result = measured(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), 6, 3)
    assert (result.groups, result.units) == (2, 9)
    assert result.log10_arrangements == pytest.approx(math.log10(math.factorial(5) * math.factorial(4)))
    assert result.share_moved == pytest.approx(1 - 2 / (20 + 24 + 10))  # all but the output's bias
    assert (
        "9 units in 2 groups may be permuted" in result.verdict().sentence
        and "10^3 equal" in result.verdict().sentence
    )
    assert result.modules == ("input", "0", "1", "2", "3", "4", "output")
    assert result.edges == tuple((i, i + 1) for i in range(6))


def test_units_inside_groups_count_for_each_group():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2))
    result = measured(model, 2, 3, 5, 5)
    assert result.units == 2 + 2 * 3  # two groups, and three channels in each of them
    assert result.log10_arrangements == pytest.approx(math.log10(2 * 6 * 6))


def test_a_module_called_twice_can_be_drawn():
    inner = nn.Linear(3, 3)
    check_result(measured(nn.Sequential(inner, nn.ReLU(), inner, nn.Linear(3, 2)), 4, 3))


def test_nothing_to_permute_and_unknown_operations_are_said():
    assert measured(nn.Linear(3, 2), 4, 3).verdict().sentence.startswith("No units of this network")

    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x).abs()

    result = measured(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), Spectrum()), 4, 3)
    assert "(_fft_r2c) are not understood, so there may be more" in result.verdict().sentence
    assert result.verdict().level is Level.OK


def test_refusals():
    with pytest.raises(MissingQuantity, match="symmetries is missing: the snapshot has no data"):
        symmetry_groups(diag.Snapshot(nn.Linear(3, 2)))
    with pytest.raises(Unsupported, match="Tracing failed in '' after"):
        symmetry_groups(diag.Snapshot(nn.Linear(3, 2), None, (torch.randn(2, 4), torch.zeros(2))))
