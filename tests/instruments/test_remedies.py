"""Remedies and naive loss minimisation against float64, closed forms and the identities that define them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag import remedies
from diag.errors import InvalidInput
from diag.instruments.naive_loss_minimization import naive_loss_minimization
from diag.result import Level
from diag.testing import check_result, classification, refusal


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- losses
# ---------------------------------------------------------------------------------------------------------


def test_stablemax_is_its_definition():
    """Proposition 1: softmax of sign(z) log(1 + |z|) is s(z) / sum s; a few float64 roundings."""
    z = 20 * normal(50, 7)
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    torch.testing.assert_close(remedies.stablemax(z), s / s.sum(1, keepdim=True), atol=1e-14, rtol=1e-12)
    y = torch.arange(50) % 7
    loss = -(s / s.sum(1, keepdim=True))[torch.arange(50), y].log().mean()
    assert float(remedies.stablemax_cross_entropy(z, y)) == pytest.approx(float(loss), rel=1e-12)


def test_a_large_vocabulary_goes_in_chunks_with_the_same_loss_and_gradient(monkeypatch):
    z, y = normal(64, 500, dtype=torch.float32), torch.arange(64)
    whole = z.clone().requires_grad_()
    remedies.stable_cross_entropy(whole, y).backward()
    monkeypatch.setattr(remedies, "LOGITS_AT_ONCE", 500 * 10)
    parts = z.clone().requires_grad_()
    loss = remedies.stable_cross_entropy(parts, y)
    loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=0, rtol=1e-6)
    assert float(loss) == pytest.approx(float(F.cross_entropy(z.double(), y)), rel=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_the_sigmoid_rounds_positives_away_at_b_ln_2_and_negatives_never(dtype, bits):
    """sigmoid(z) = 1 / (1 + e^-z) rounds to 1 from z = b ln 2 on; 0.7 above is one unit, 0.7 below a half more."""
    edge = bits * math.log(2)
    for target, z, lost in ((1.0, edge + 0.7, True), (1.0, edge - 0.7, False), (0.0, -edge - 20, False)):
        x, y = torch.tensor([z], dtype=dtype, requires_grad=True), torch.tensor([target], dtype=dtype)
        (plain,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(x, y), x)
        (exact,) = torch.autograd.grad(remedies.stable_binary_cross_entropy(x, y), x)
        assert (float(plain) == 0) == lost
        assert float(exact) == pytest.approx((1 - 2 * target) * math.exp(-abs(z)), rel=1e-5)


def test_binary_cross_entropy_agrees_where_nothing_rounds_and_refuses():
    z, y = normal(40, 3), (normal(40, 3, seed=1) > 0).double()
    expected = F.binary_cross_entropy_with_logits(z, y)
    assert float(remedies.stable_binary_cross_entropy(z, y)) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(InvalidInput, match="expected one shape, and targets 0 or 1"):
        remedies.stable_binary_cross_entropy(z, y + 0.5)
    with pytest.raises(InvalidInput, match="expected one of mean, sum, none"):
        remedies.stable_binary_cross_entropy(z, y, reduction="max")


# -- perpendicular gradients
# ----------------------------------------------------------------------------------------


def stepped(whole, optimizer_class=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    optimizer = optimizer_class(model.parameters(), lr=0.1, **settings)
    handle = remedies.perp_grad(optimizer, whole=whole)
    F.cross_entropy(model(normal(20, 5, dtype=torch.float32)), torch.arange(20) % 3).backward()
    before = [p.grad.clone() for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return model, values, before, handle, optimizer


def test_each_tensor_is_projected_and_keeps_its_length():
    """Float32: the part along a tensor is gone to 1e-6 of the lengths, the length kept to 1e-6."""
    model, values, before, _, _ = stepped(whole=False)
    for p, w, g in zip(model.parameters(), values, before, strict=True):
        assert abs(float((w * p.grad).sum())) < 1e-6 * float(w.norm() * g.norm())
        assert float(p.grad.norm()) == pytest.approx(float(g.norm()), rel=1e-6)
        torch.testing.assert_close(p.detach(), w - 0.1 * p.grad)  # the optimizer stepped by what was projected


def projected(p, g):
    """What a step of gradient descent at rate 0 leaves as the gradient of weights p with gradient g."""
    p = nn.Parameter(p)
    p.grad = g.clone()
    optimizer = torch.optim.SGD([p], lr=0.0)
    remedies.perp_grad(optimizer)
    optimizer.step()
    return p.grad


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e20])
def test_small_large_and_nearly_parallel_gradients_are_projected_right(size):
    """Float32 against float64: squares that over- or underflow, and a cosine of 1 - 5e-7, of which the angle is
    1e-3 and its rounding 1e-4 of it."""
    p, other = normal(200, dtype=torch.float32), normal(200, seed=1, dtype=torch.float32)
    for near, within in ((0.0, 1e-6), (1e-3, 1e-3)):
        g = size * (other if near == 0 else p + near * other)
        w, exact = p.double(), g.double()
        rest = exact - (w @ exact) / (w @ w) * w
        expected = rest * exact.norm() / rest.norm()
        found = projected(p, g).double()
        assert float((found - expected).norm() / expected.norm()) < within


def test_nothing_is_left_of_a_gradient_along_its_tensor():
    """Of a tensor with one entry all is along it: what rounding leaves is not blown up to the old length."""
    assert float(projected(torch.tensor([3.0]), torch.tensor([0.7]))) == 0
    assert not projected(torch.full((5,), 0.3), torch.full((5,), 0.1)).any()
    assert torch.equal(projected(torch.zeros(3), torch.ones(3)), torch.ones(3))  # no direction to lose
    assert projected(torch.ones(3), torch.tensor([1.0, torch.nan, 2.0])).isnan().any()  # what broke is not hidden


def test_half_precision_weights_lose_their_part_along_the_tensor():
    """The gradient is rounded to bfloat16 once, by up to 2^-9 of each of its entries: five standard deviations of
    what that leaves along the weights."""
    p, other = normal(4000, dtype=torch.bfloat16), normal(4000, seed=1, dtype=torch.bfloat16)
    g = other + 0.5 * p
    found, w = projected(p, g).double(), p.double()
    assert abs(float(w @ found)) < 5 * 2**-9 / 3**0.5 * float((w * found).norm())
    assert float(found.norm()) == pytest.approx(float(g.double().norm()), rel=1e-3)


def test_the_whole_vector_is_projected_and_only_shortened():
    model, values, before, _, _ = stepped(whole=True)
    w, g = (torch.cat([t.reshape(-1).double() for t in ts]) for ts in (values, before))
    found = torch.cat([p.grad.reshape(-1).double() for p in model.parameters()])
    torch.testing.assert_close(found, g - (w @ g) / (w @ w) * w, atol=1e-7, rtol=1e-6)
    assert abs(float(w @ found)) < 1e-6 * float(w.norm() * g.norm())


def test_it_ends_when_it_is_removed_and_refuses_closures():
    model, _, _, handle, optimizer = stepped(whole=False, optimizer_class=torch.optim.AdamW)
    with pytest.raises(InvalidInput, match="a closure computes inside the step"):
        optimizer.step(lambda: torch.zeros(()))
    handle.remove()
    grads = [p.grad.clone().mul_(0).add_(1) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


# -- naive loss minimisation
# ----------------------------------------------------------------------------------------


def homogeneous():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 8, bias=False), nn.ReLU())
    model.append(nn.Linear(8, 4, bias=False))
    return model.double(), (normal(30, 6), torch.arange(30) % 4)


def test_the_inner_product_is_the_same_for_every_layer_and_that_of_the_logits():
    """Euler: <W_l, dL/dW_l> = mean <p - e_y, z> for a bias-free ReLU network, and the derivative by a scale of the
    logits; float64."""
    model, (x, y) = homogeneous()
    found = naive_loss_minimization(diag.Snapshot(model, F.cross_entropy, (x, y)))
    z = model(x).detach()
    expected = float(((z.softmax(1) - F.one_hot(y, 4)) * z).sum(1).mean())
    assert list(found.inner_products.values()) == pytest.approx([expected] * 3, rel=1e-10)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(scale * z, y), scale)
    assert float(slope) == pytest.approx(expected, rel=1e-10)


def test_pure_scaling_has_cosine_one_and_changes_no_decision():
    z = normal(40, 5)
    given = {"params": {"w": torch.ones(3)}, "gradient": {"w": -2 * torch.ones(3)}}
    found = naive_loss_minimization(**given, logits=1.5 * z + 3, previous_logits=z)
    assert found.logit_cosine == pytest.approx(1, abs=1e-12) and found.logit_growth == pytest.approx(1.5)
    assert found.changed == 0 and found.cosine == pytest.approx(1) and found.null == pytest.approx(3**-0.5)
    away = naive_loss_minimization(**given, logits=-z, previous_logits=z)
    assert away.logit_cosine == pytest.approx(-1, abs=1e-12) and away.changed > 0.5
    check_result(found)
    assert found.verdict().level is Level.DESCRIPTION


def test_cosines_by_chance_have_the_stated_spread():
    """2,000 draws of 25 numbers: the standard deviation of a cosine is 1/5, within 4 / sqrt(2 * 2000) = 6 %."""
    draws = [
        naive_loss_minimization({"w": normal(25, seed=i)}, {"w": normal(25, seed=9999 + i)}).cosine
        for i in range(2000)
    ]
    assert torch.tensor(draws).std() == pytest.approx(0.2, rel=0.07)


def test_on_a_snapshot_with_an_earlier_state_and_refusals():
    found = naive_loss_minimization(classification().snapshot())
    assert 0 < found.logit_cosine < 1 and found.logit_growth > 1 and len(found.cosines) == 6
    wrong = {"params": {"w": torch.ones(3)}, "gradient": {"w": torch.ones(2)}}
    assert "other names or shapes" in refusal(naive_loss_minimization, **wrong)
    zero = naive_loss_minimization({"w": torch.ones(3)}, {"w": torch.zeros(3)})
    assert zero.verdict().level is Level.NOT_APPLICABLE
