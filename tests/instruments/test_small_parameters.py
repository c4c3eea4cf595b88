"""A bias or a temperature without a gradient explains little; a trunk or an embedding may explain all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.labels_belong import WHAT_ELSE
from diag.instruments.outcome.trivial import EXPLAINED_BY


class Scaled(nn.Module):
    """A layer that trains, and a parameter of this shape that is not used."""

    def __init__(self, *shape):
        super().__init__()
        self.body, self.spare = nn.Linear(6, 3), nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.body(x)


def cause_of(*shape):
    torch.manual_seed(0)
    model = Scaled(*shape)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["gradients_reach"]) as watcher:
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
            optimizer.step()
    (finding,) = watcher.findings
    return finding.verdict.cause


@pytest.mark.parametrize("shape", [(), (7,), (1, 1, 5)])
def test_a_vector_without_a_gradient_has_a_cause_of_its_own(shape):
    assert cause_of(*shape) == Cause.VECTOR_UNTRAINED


def test_a_matrix_without_one_may_be_what_nothing_is_learned_for():
    assert cause_of(8, 6) == Cause.GRADIENT_ABSENT
    assert Cause.GRADIENT_ABSENT in EXPLAINED_BY and Cause.GRADIENT_ABSENT in WHAT_ELSE


def test_nothing_that_fails_to_be_learned_is_put_down_to_a_vector():
    assert Cause.VECTOR_UNTRAINED not in EXPLAINED_BY and Cause.VECTOR_UNTRAINED not in WHAT_ELSE


def test_the_bias_of_one_output_cancels_in_a_loss_of_differences():
    """As of a critic: its gradient is zero by arithmetic, and nothing is wrong with the layer."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(critic.parameters(), 0.01)
    with diag.watch(critic, instruments=["gradient_flow"]) as watcher:
        for _ in range(40):
            optimizer.zero_grad()
            (critic(torch.randn(16, 6)).mean() - critic(1 + torch.randn(16, 6)).mean()).backward()
            optimizer.step()
    assert not watcher.findings
