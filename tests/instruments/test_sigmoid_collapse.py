"""Sigmoid collapse: the law against torch's own rounding, losses as they are written, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag import remedies
from diag.errors import InvalidInput, MissingQuantity
from diag.instruments.sigmoid_collapse import sigmoid_collapse, sigmoid_edge
from diag.result import Level
from diag.snapshot.objective.decisions import BinaryDecisions
from diag.testing import check_result

sigmoid_loss = F.binary_cross_entropy_with_logits
TYPES = ("bfloat16", "float16", "float32", "float64")


class Given(nn.Module):
    """Outputs that are the inputs, times a weight of one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, z):
        return z * self.weight


def measure(z, y, loss=sigmoid_loss):
    return sigmoid_collapse(diag.Snapshot(Given(z.dtype), loss, (z, y)))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_target_of_one_loses_its_gradient_at_the_edge(dtype):
    """Logits 1 % below and above the edge, by the gradient that torch itself computes; bfloat16 holds 2 to 3
    digits."""
    edge, slack = sigmoid_edge(dtype), 0.05 if dtype in ("bfloat16", "float16") else 0.01
    z = torch.tensor([[edge * (1 - slack)], [edge * (1 + slack)]], dtype=getattr(torch, dtype))
    found = measure(z, torch.ones_like(z))
    assert found.collapsed == found.collapsed_positive == found.zero_gradient_by_dtype[dtype] == 0.5
    assert math.isnan(found.collapsed_negative) and found.dtype == dtype


def test_a_target_of_zero_goes_on_far_past_it():
    z = torch.tensor([-20.0, -60.0, -110.0])
    found = measure(z, torch.zeros(3))
    assert found.collapsed_negative == pytest.approx(1 / 3)
    assert found.zero_gradient_by_dtype["float64"] == 0 and found.median_negative == 60
    assert "33.3 % of the targets 0" in found.verdict().sentence


def test_half_of_the_positives_and_no_negative():
    """Logits 20 and 2 of targets 1, -20 and -2 of targets 0: 20 is past 24 ln 2 = 16.6; float32."""
    z, y = torch.tensor([[20.0, 2.0], [-20.0, -2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    found = measure(z, y)
    assert (found.collapsed, found.collapsed_positive, found.collapsed_negative) == (0.25, 0.5, 0.0)
    assert found.headroom == pytest.approx(24 * math.log(2) - 2) and found.accuracy == 1
    assert found.margins.tolist() == [20, 2, 20, 2] and found.positive.tolist() == [True, True, False, False]
    assert found.verdict().level == Level.DESCRIPTION
    check_result(found)


def test_the_exact_form_keeps_the_gradient():
    z, y = torch.tensor([20.0, 30.0, -3.0]), torch.tensor([1.0, 1.0, 0.0])
    found = measure(z, y, remedies.stable_binary_cross_entropy)
    assert found.collapsed == 0 and found.gradient_error < 1e-5 and found.verdict().level == Level.DESCRIPTION
    assert found.zero_gradient_by_dtype["float32"] == pytest.approx(2 / 3)
    assert "None of 3 decisions" in found.verdict().sentence


def test_weights_of_outputs_and_positives_are_factors():
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(40, 3, generator=generator)
    y = (torch.rand(40, 3, generator=generator) < 0.5).float()
    weight, more = torch.tensor([0.1, 1.0, 7.0]), torch.tensor([3.0, 1.0, 0.5])
    found = measure(z, y, lambda a, b: sigmoid_loss(a, b, weight=weight, pos_weight=more))
    assert found.verdict().level == Level.DESCRIPTION and found.collapsed == 0 and found.gradient_error < 1e-5


def test_masked_decisions_do_not_count():
    z, y = torch.tensor([[20.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = measure(z, y, lambda a, b: sigmoid_loss(a, b, weight=mask))
    assert len(found.margins) == 3 and found.collapsed == pytest.approx(1 / 3)


def test_soft_targets_are_never_certain():
    z = torch.tensor([20.0, 30.0])
    with pytest.raises(MissingQuantity, match="neither 0 nor 1"):
        measure(z, torch.tensor([0.9, 0.1]))
    assert len(measure(z, torch.tensor([0.9, 1.0])).margins) == 1


def test_another_loss_of_the_same_targets_has_no_verdict():
    z, y = torch.randn(30, generator=torch.Generator().manual_seed(0)), (torch.arange(30) % 2).float()
    verdict = measure(z, y, lambda a, b: (a - b).square().mean()).verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "not a plain cross-entropy of the sigmoid" in verdict.sentence


def test_what_has_no_law_and_what_is_masked_throughout_is_refused():
    def given(dtype, gradients):
        z = torch.zeros(4, dtype=dtype)
        return BinaryDecisions(z, torch.arange(4) > 1, torch.full_like(z, gradients), torch.zeros(4).long())

    with pytest.raises(InvalidInput, match="dtype complex64; expected one of bfloat16"):
        sigmoid_collapse(binary_decisions=given(torch.complex64, 1))
    with pytest.raises(InvalidInput, match="Every decision has a gradient of zero far from rounding"):
        sigmoid_collapse(binary_decisions=given(torch.float32, 0))


@pytest.mark.parametrize(
    ("loss", "targets", "said"),
    [
        (F.cross_entropy, torch.tensor([0, 1]), "compares no logits with targets of zeros and ones"),
        (F.mse_loss, torch.zeros(2, 3), "compares no logits with targets of zeros and ones"),
        (None, torch.zeros(2, 3), "the snapshot has no loss; give loss_fn="),
    ],
)
def test_what_makes_no_decisions_is_refused(loss, targets, said):
    with pytest.raises(MissingQuantity, match=said) as caught:
        measure(torch.randn(2, 3), targets, loss)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
