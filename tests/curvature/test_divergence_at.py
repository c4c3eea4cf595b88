"""The divergence of a model's distribution from its own elsewhere, against torch.distributions and by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

import diag
from diag.errors import MissingQuantity
from diag.testing import leaves_no_trace


class Given(nn.Module):
    """The outputs are parameters: those of example i are `outputs[i]`."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, rows):
        return self.outputs[rows]


def divergence(before, after, targets):
    """The mean divergence of the outputs `after` from `before`."""
    snapshot = diag.Snapshot(Given(before.clone()), None, (torch.arange(len(before)), targets))
    return snapshot.quantity("divergence_at")(after.flatten())


def moved(model, point):
    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(point, other.parameters())
    return other


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_the_mean_over_the_examples(micro_batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = torch.randn(50, 4).double(), torch.arange(50) % 3
    at = diag.Snapshot(model, None, (x, y), micro_batch=micro_batch).quantity("divergence_at")
    point = at.center + 0.3 * torch.randn_like(at.center)
    with leaves_no_trace(model):
        found = at(point)
        assert at(at.center) == 0
    before, after = (Categorical(logits=m.eval()(x)) for m in (model, moved(model, point)))
    assert found == pytest.approx(float(kl_divergence(before, after).mean().detach()), rel=1e-10)


def test_two_classes_by_hand():
    """p = 0.8 against q = 0.5: 0.8 ln 1.6 + 0.2 ln 0.4."""
    before, after = torch.tensor([[math.log(4.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert divergence(before, after, torch.tensor([0])) == pytest.approx(expected, rel=1e-6)


def test_positions_without_a_label_with_the_classes_on_the_second_axis():
    torch.manual_seed(0)
    before, after = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    targets = torch.zeros(2, 5, dtype=torch.long)
    targets[:, 3:] = -100
    each = kl_divergence(Categorical(logits=before), Categorical(logits=after))
    classes_second = (before.movedim(-1, 1), after.movedim(-1, 1))
    assert divergence(*classes_second, targets) == pytest.approx(float(each[:, :3].mean()), rel=1e-12)


def test_a_class_that_is_masked_out_adds_nothing_and_nan_stays_nan():
    before, after = torch.tensor([[1.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, -torch.inf]])
    two = divergence(before[:, :2], after[:, :2], torch.tensor([0]))
    assert two > 0 and divergence(before, after, torch.tensor([0])) == pytest.approx(two, rel=1e-12)
    assert math.isnan(divergence(before, after + torch.nan, torch.tensor([0])))


def test_real_targets_make_a_gaussian():
    before, after = torch.zeros(2, 3), torch.ones(2, 3)
    assert divergence(before, after, torch.zeros(2, 3)) == 1.5


def test_in_single_precision_the_divergence_is_right_down_to_its_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x, y = torch.randn(60, 8), torch.arange(60) % 4
    at = diag.Snapshot(model, None, (x, y)).quantity("divergence_at")
    exact = diag.Snapshot(copy.deepcopy(model).double(), None, (x.double(), y)).quantity("divergence_at")
    direction = nn.functional.normalize(torch.randn_like(at.center), dim=0)
    size = 1.0
    while at(at.center + size * direction) > at.rounding:
        # The outputs move by a hundred of their roundings or more, and the divergence is their square.
        point = at.center + size * direction
        assert at(point) == pytest.approx(exact(point.double()), rel=0.05)
        size /= 3
    assert size < 1e-3


def test_without_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return {"a": self.layer(x)}

    snapshot = diag.Snapshot(Named(), None, (torch.ones(3, 2), torch.zeros(3, dtype=torch.long)))
    with pytest.raises(MissingQuantity, match="divergence_at is missing: the model returns a dict without logits"):
        snapshot.quantity("divergence_at")
