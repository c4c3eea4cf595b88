"""What a network's weights may do without its function knowing: counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import MissingQuantity
from diag.instruments.linear_freedom import linear_freedom
from diag.result import Level
from diag.testing import check_instrument


def test_contract():
    check_instrument(linear_freedom)


def test_counts_of_a_small_network_are_those_by_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3)
        )
        data = torch.randn(8, 4), torch.randn(8, 3)
    found = linear_freedom(diag.Snapshot(model, F.mse_loss, data))
    # One number a ReLU unit, a sign a tanh unit, any invertible map between two linear layers.
    assert (found.scale, found.sign, found.invertible, found.orthogonal) == (1, 1, 1, 0)
    assert found.directions == 7 + 25
    verdict = found.verdict()
    assert verdict.level is Level.DESCRIPTION and "1 scale, 1 sign, 1 invertible" in verdict.sentence
    assert found.deviation == pytest.approx(0, abs=1e-9)
    assert found.places["scale of 0.weight[0]"] == "0.weight +, 0.bias +, 2.weight -"


def test_a_network_whose_units_are_held_by_their_activation_has_none():
    """GELU is neither odd nor homogeneous, so that no sign and no scale of its units goes unseen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 3)), (torch.randn(8, 4), None)
    found = linear_freedom(diag.Snapshot(model, None, data))
    assert found.directions == 0 and not found.places
    assert found.verdict().sentence.startswith("No linear map of this network's units beyond permutations")


def test_without_data_it_is_refused():
    with pytest.raises(MissingQuantity, match="data"):
        linear_freedom(diag.Snapshot(nn.Linear(2, 2), None))
