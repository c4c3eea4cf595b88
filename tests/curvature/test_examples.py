"""Curvature by example against per-example Jacobians built one row at a time, and optimizers' divisors against
the step that the optimizer takes."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diag.curvature.examples import curvature_shares
from diag.curvature.layout import participation
from diag.curvature.matrices import GaussNewton, Hessian
from diag.curvature.stability.preconditioner import divisor, preconditioned
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
CLOSE = 2e-6  # float32, as in test_curvature.py


@pytest.fixture(scope="module")
def problem():
    model, loss_fn, batches = cases.build(cases.mlp)
    reference = cases.Reference(model, loss_fn, batches)
    x, y = (
        torch.cat([getattr(b, part) if part == "targets" else b.args[0] for b in batches])
        for part in ("args", "targets")
    )
    z = reference.model(x.double())
    jacobians = torch.stack([torch.stack([reference._backward(k) for k in row]) for row in z])  # (n, K, P)
    return GaussNewton(model, loss_fn, batches), reference, z.detach(), y, jacobians


def test_curvature_shares(problem):
    operator, _, z, _, jacobians = problem
    v = cases.directions(operator.size)[0]
    tangents = jacobians @ v.double()
    p = z.softmax(1)
    expected = (p * tangents**2).sum(1) - (p * tangents).sum(1) ** 2
    shares = curvature_shares(operator, v)
    assert cases.relative(shares, expected) < CLOSE
    assert float(shares.mean()) == pytest.approx(float(v @ (operator @ v)), rel=1e-5)


def test_what_examples_cannot_be_told_apart_is_refused():
    model = cases.Composed(lambda self, x: self.net(x).mean(0, keepdim=True), net=nn.Linear(4, 3))
    data = list(as_batches((torch.randn(6, 4), torch.randn(6, 3))))
    operator = GaussNewton(model, lambda z, t: (z - t).square().mean(), data)
    with pytest.raises(InvalidInput, match=r"outputs of shapes \[\(1, 3\)\] for 6 examples; expected one tensor"):
        curvature_shares(operator, torch.ones(operator.size))


def test_models_without_second_derivatives_have_no_jacobian_products():
    operator = Hessian(
        nn.Sequential(nn.Linear(4, 3)), F.multi_margin_loss, cases.ragged(torch.randn(9, 4), torch.arange(9) % 3)
    )
    with pytest.raises(
        Unsupported, match=r"need a model that can be differentiated twice, and here .*multi_margin"
    ):
        curvature_shares(operator, torch.ones(operator.size))


def test_participation_of_a_vector():
    operator = Hessian(*cases.build(cases.tied_gpt))
    v = torch.zeros(operator.size)
    v[operator.layers["qkv"]] = 1.0
    v[operator.layers["position"]] = 2.0  # the position table, a parameter of the root
    found = participation(operator.layout, v)
    qkv = operator.layers["qkv"].stop - operator.layers["qkv"].start
    assert found["qkv"] == pytest.approx(qkv / (qkv + 4 * 20)) and sum(found.values()) == pytest.approx(1)
    assert found["mix"] == 0 and list(found) == list(operator.layers)
    assert participation(operator.layout, 1e-3 * v) == pytest.approx(found)  # of any length
    assert all(math.isnan(share) for share in participation(operator.layout, torch.zeros(operator.size)).values())


def test_a_parametrised_weight_belongs_to_its_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 1))
    operator = Hessian(model, F.mse_loss, cases.ragged(torch.randn(9, 2), torch.randn(9, 1)))
    assert operator.layers == {"0": slice(0, 12), "1": slice(12, 16)}


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.99)),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.0, 0.99), weight_decay=0.0),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9), amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-2, betas=(0.0, 0.99)),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_divisor_is_the_one_of_the_optimizers_step(name):
    """Without momentum the step is lr g / D, so D = lr g / step wherever the gradient is not tiny."""
    model, loss_fn, batches = cases.build(
        lambda: (
            nn.Linear(5, 3).double(),
            F.cross_entropy,
            cases.ragged(torch.randn(9, 5).double(), torch.arange(9) % 3),
        )
    )
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(4):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        sum(loss_fn(model(b.args[0]), b.targets) for b in batches).backward()
        optimizer.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    operator = Hessian(model, loss_fn, batches)
    found = divisor(operator, optimizer)
    # The steps are differences of weights of order one, known to 1e-16, and themselves of order 1e-3.
    assert torch.allclose(found, 0.01 * gradient / step, rtol=1e-9)
    scaled = preconditioned(operator, optimizer).to_dense()
    expected = operator.to_dense() / found.sqrt()[:, None] / found.sqrt()
    assert cases.relative(scaled, expected) < 1e-12
    assert (preconditioned(operator, optimizer) is operator) == (name == "SGD")


def test_a_divisor_of_one_in_places_is_still_one():
    model, loss_fn, batches = cases.build(cases.mlp)
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)
    for p in model.parameters():  # after very many steps, when nothing is left to correct
        second_moment = torch.full_like(p, 4.0)
        second_moment.view(-1)[0] = 1.0
        optimizer.state[p] = {
            "step": torch.tensor(1e6),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": second_moment,
        }
    operator = Hessian(model, loss_fn, batches)
    found = divisor(operator, optimizer)
    assert sorted(set(found.tolist())) == [1.0, 2.0]
    expected = operator.to_dense() / found.sqrt()[:, None] / found.sqrt()
    assert cases.relative(preconditioned(operator, optimizer).to_dense(), expected) < 1e-6


def test_divisors_that_are_not_known():
    model, loss_fn, batches = cases.build(cases.mlp)
    operator = Hessian(model, loss_fn, batches)
    with pytest.raises(
        Unsupported, match="The optimizer is Rprop, whose divisor is not known here; expected one of SGD"
    ):
        divisor(operator, torch.optim.Rprop(model.parameters()))
    for kind in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax):
        with pytest.raises(MissingQuantity, match="has no state yet; take at least one step with it"):
            divisor(operator, kind(model.parameters()))
    with pytest.raises(
        InvalidInput, match=r"does not hold parameter 0\.weight; give the optimizer that trains this"
    ):
        divisor(operator, torch.optim.Adam(nn.Linear(2, 2).parameters()))


def test_a_parameter_that_was_never_updated_takes_no_part():
    model = cases.Composed(lambda self, x: self.used(x), unused=nn.Linear(2, 2), used=nn.Linear(4, 3))
    batches = cases.ragged(torch.randn(9, 4), torch.arange(9) % 3)
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(batches[0].args[0]), batches[0].targets).backward()
    optimizer.step()
    operator = Hessian(model, F.cross_entropy, batches)
    dense = preconditioned(operator, optimizer).to_dense()
    assert torch.isfinite(dense).all() and not dense[operator.layers["unused"]].any()
    assert dense[operator.layers["used"]].any()
