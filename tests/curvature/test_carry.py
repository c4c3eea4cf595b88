"""What is carried between measurements: the self-test, start vectors, and when both are renewed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.curvature import operators as curvature
from diag.curvature.carry import RENEW_EVERY, Carry, carried_eigenpairs, construction
from diag.errors import Unsupported
from diag.linalg.operator import LinearOperator
from diag.snapshot.snapshot import Snapshot


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Dropout(0.1), nn.Linear(20, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(40, 12), torch.arange(40) % 3)


@pytest.fixture
def tests_run(monkeypatch):
    """The self-tests that were run in full."""
    run, full = [], curvature.run_self_test

    def counted(*args, **kwargs):
        run.append(args)
        return full(*args, **kwargs)

    monkeypatch.setattr(curvature, "run_self_test", counted)
    return run


def trained(model, loss, data, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    return model, loss, data


def test_a_self_test_is_taken_over_and_renewed(problem, tests_run):
    carry, ran, earlier = Carry(), [], []
    for _ in range(2 * RENEW_EVERY + 1):
        test = Snapshot(*trained(*problem), carry=carry).quantity("hessian").self_test
        ran.append(len(tests_run))
        earlier.append("at an earlier measurement" in test.sentence())
    assert ran == [1] * RENEW_EVERY + [2] * RENEW_EVERY + [3]
    assert [i for i, taken in enumerate(earlier) if not taken] == [0, RENEW_EVERY, 2 * RENEW_EVERY]
    # Another kind of operator has a test of its own, and without a carry every snapshot tests.
    Snapshot(*problem, carry=carry).quantity("gauss_newton")
    Snapshot(*problem).quantity("hessian")
    assert len(tests_run) == 5


def hook_of_torch(*_):
    """One that fires while measuring, as hooks of others do not."""


hook_of_torch.__module__ = "torch.nn.utils.somewhere"
CHANGES = {
    "mode": lambda m, o, d: m.eval(),
    "a plain setting": lambda m, o, d: setattr(m[2], "p", 0.5),
    "requires_grad": lambda m, o, d: m[0].weight.requires_grad_(False),
    "a hook that is a part of the network": lambda m, o, d: m[0].register_forward_hook(hook_of_torch),
    "a layer": lambda m, o, d: m.__setitem__(1, nn.ReLU()),
    "a parametrisation": lambda m, o, d: nn.utils.parametrizations.weight_norm(m[0]),
    "the loss's setting": lambda m, o, d: setattr(o, "label_smoothing", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_product_rests_on_is_tested_again(problem, tests_run, change):
    carry = Carry()
    for _ in range(2):
        Snapshot(*problem, carry=carry).quantity("hessian")
    assert len(tests_run) == 1
    CHANGES[change](*problem)
    Snapshot(*problem, carry=carry).quantity("hessian")
    assert len(tests_run) == 2


def test_another_loss_or_other_shapes_are_another_construction(problem):
    model, loss, (x, y) = problem
    one = construction(Snapshot(*problem))
    assert construction(Snapshot(*trained(*problem))) == one  # values do not count
    assert construction(Snapshot(model, nn.CrossEntropyLoss(), (x, y))) != one
    assert construction(Snapshot(model, loss, (x[:20], y[:20]))) != one
    assert construction(Snapshot(model, loss, [(x[:20], y[:20]), (x[20:], y[20:])])) != one
    assert construction(Snapshot(model.double(), loss, (x.double(), y))) != one


class Switching(nn.Module):
    """A straight-through rounding behind a parameter's value: only a test in full can see that it is on."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(12, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        z = self.layer(x)
        if self.gate > 1:
            z = z + (2 * z.round() - 3 * z).detach()
        return z + self.gate


def test_what_a_value_switches_on_is_caught_at_the_next_renewal():
    """The Unsupported of the self-test comes at the latest RENEW_EVERY measurements later."""
    torch.manual_seed(0)
    model, carry = Switching(), Carry()
    data = torch.randn(20, 12), torch.randn(20, 3)
    Snapshot(model, F.mse_loss, data, carry=carry).quantity("hessian")
    with torch.no_grad():
        model.gate.fill_(2)
    for _ in range(RENEW_EVERY - 1):
        Snapshot(model, F.mse_loss, data, carry=carry).quantity("hessian")
    with pytest.raises(Unsupported, match="is not the derivative of the loss"):
        Snapshot(model, F.mse_loss, data, carry=carry).quantity("hessian")


def test_eigenpairs_are_right_whatever_is_carried(problem):
    """Through training, against the dense matrix; the first and each fourth run starts cold, and is bit-identical
    to a run without a carry."""
    carry, same = Carry(), []
    for _ in range(2 * RENEW_EVERY):
        plain = Snapshot(*trained(*problem, steps=5)).quantity("hessian")
        hessian = Snapshot(*problem, carry=carry).quantity("hessian")
        truth = torch.linalg.eigvalsh(plain.to_dense().double())
        for count in (1, 3):
            pairs = carried_eigenpairs(hessian, "hessian", largest=count)
            error = (pairs.values - truth.flip(0)[:count]).abs()
            assert (error <= pairs.residuals + pairs.rounding + 1e-6).all()
        cold = carried_eigenpairs(plain, "hessian", largest=3)
        same.append(torch.equal(cold.vectors, pairs.vectors))
        # Once more at the same moment: no search is due.
        assert carried_eigenpairs(hessian, "hessian", largest=1).num_products <= 6
    assert [i for i, equal in enumerate(same) if equal] == [0, RENEW_EVERY]


def test_the_edge_of_stability_is_the_same_with_and_without(problem):
    model, loss, data = problem
    optimizer, carry = torch.optim.Adam(model.parameters(), 1e-3), Carry()
    spent = []
    for step in range(1, 60):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
        if step < 50 or step % 3:
            continue
        cold, warm = (
            diag.edge_of_stability(
                Snapshot(model, loss, data, optimizer=optimizer, carry=given), batch_size=40, max_products=100
            )
            for given in (None, carry)
        )
        for name in ("lambda_max", "sharpness", "ratio"):
            assert getattr(warm, name) == pytest.approx(getattr(cold, name), rel=2e-3)
        assert not math.isnan(warm.ratio) and warm.verdict().level == cold.verdict().level
        spent.append(warm.num_products - cold.num_products)
    assert spent[0] == 0 and len(spent) == 3


def test_a_watched_run_carries(tests_run):
    """One watch, one carry: fewer tests than measurements, and it says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    x, y = torch.randn(40, 12), torch.arange(40) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    settings = {"edge_of_stability": {"batch_size": 40}}
    with diag.watch(model, budget=math.inf, every=1, probe=(x, y), instruments=settings) as watcher:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    series = watcher.run.series("edge_of_stability")
    assert len(series) == 6
    taken = ["at an earlier measurement" in " ".join(result.notes) for _, result in series]
    assert taken == [i % RENEW_EVERY != 0 for i in range(6)]
    assert len(tests_run) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_a_multiple_eigenvalue_comes_with_its_multiplicity(dtype, seed):
    """{5, 5, 4, ...}: one start vector sees one copy of 5, and 4 would stand in the place of the other."""
    spectrum = torch.cat([torch.tensor([5.0, 5.0, 4.0]), torch.linspace(-1, 1, 57)]).double()
    turn = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(7)).double())[0]
    matrix = ((turn * spectrum) @ turn.T).to(dtype)
    operator = LinearOperator.from_matrix((matrix + matrix.T) / 2)
    pairs = carried_eigenpairs(operator, "hessian", largest=2, tolerance=1e-3, seed=seed)
    assert pairs.values.tolist() == pytest.approx([5.0, 5.0], rel=2e-3)
    assert pairs.vectors is not None and float((pairs.vectors[0] @ pairs.vectors[1]).abs()) < 1e-3
    residual = matrix @ pairs.vectors.T - pairs.vectors.T * pairs.values.to(dtype)
    assert float(residual.norm(dim=0).max()) < 2e-2
