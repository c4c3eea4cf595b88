"""Measuring leaves no trace: modes, buffers, gradients, flags and random states, also after an exception."""

import random

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.snapshot import pause
from diag.snapshot.preserve import preserved
from diag.testing import leaves_no_trace


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    made[2].eval()  # a mode that differs from its parent's
    made(torch.randn(5, 3)).sum().backward()
    made[0].weight.requires_grad_(False)
    return made


def disturb(model):
    model.train()
    model(torch.randn(5, 3)).sum().backward()
    model.requires_grad_(True)
    random.random(), numpy.random.rand(), torch.rand(3)


def test_nothing_is_left_behind(model):
    with leaves_no_trace(model), preserved(model):
        assert not any(m.training for m in model.modules())
        disturb(model)


def test_nothing_is_left_behind_by_an_exception(model):
    with leaves_no_trace(model), pytest.raises(ZeroDivisionError), preserved(model):
        disturb(model)
        raise ZeroDivisionError


def test_the_check_itself_sees_every_kind_of_trace(model):
    for leave in (
        lambda: model.train(),
        lambda: model[1].running_mean.add_(1),
        lambda: torch.rand(1),
        lambda: numpy.random.rand(),
        lambda: random.random(),
        lambda: model[0].weight.requires_grad_(not model[0].weight.requires_grad),
        lambda: model[0].weight.data.add_(1),
        lambda: model[3].register_forward_hook(lambda *a: None),
        lambda: model[3].weight.grad.add_(1),
    ):
        model.eval()
        with pytest.raises(AssertionError, match="Measuring changed"), leaves_no_trace(model):
            leave()


def test_gradients_that_accumulate_inside_are_put_back(model):
    kept = model[3].weight.grad
    value = kept.clone()
    with preserved(model):
        model.zero_grad(set_to_none=True)
        model(torch.randn(5, 3)).sum().backward()
    assert model[3].weight.grad is kept
    assert torch.equal(kept, value)


def test_untouched_buffers_keep_their_version(model):
    # A write would invalidate graphs that the training loop still holds.
    before = model[1].running_mean._version
    with preserved(model):
        model(torch.randn(5, 3))
    assert model[1].running_mean._version == before


def test_a_buffer_that_the_forward_pass_binds_anew_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return super().forward(x)

    model = Counting()
    with leaves_no_trace(model), preserved(model):
        model(torch.ones(1, 2))
        assert model.count == 1


def test_autocast_and_tf32_are_off_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16), preserved(nn.Linear(1, 1)):
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_a_forward_under_autocast_that_accelerate_put_in_place_is_stepped_over():
    """Accelerate keeps the model's own forward as `_original_forward` and assigns one that enters autocast."""
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    exact = model(x).detach()
    model._original_forward = model.forward

    def widened(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model._original_forward(x).float()

    model.forward = widened
    rounded = model(x)
    assert not torch.equal(rounded, exact)
    with leaves_no_trace(model), preserved(model):
        assert torch.equal(model(x), exact)
    assert model.forward is widened and torch.equal(model(x), rounded)
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (x, torch.zeros(5, dtype=torch.long)))
    assert torch.equal(snapshot.quantity("logits"), exact)


def test_the_flag_is_up_only_while_measuring():
    assert not pause.is_measuring()
    with preserved(nn.Linear(1, 1)):
        assert pause.is_measuring()
    assert not pause.is_measuring()


def test_reading_a_shuffled_loader_does_not_change_what_training_sees():
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(2, (20,)))

    def orders(measure):
        generator = torch.Generator().manual_seed(3)
        loader = torch.utils.data.DataLoader(data, batch_size=7, shuffle=True, generator=generator)
        model = nn.Linear(3, 2)
        torch.manual_seed(1)
        if measure:
            diag.Snapshot(model, nn.CrossEntropyLoss(), loader).quantity("logits")
        return [x for x, _ in loader] + [torch.rand(1)]

    assert all(torch.equal(a, b) for a, b in zip(orders(True), orders(False), strict=True))
