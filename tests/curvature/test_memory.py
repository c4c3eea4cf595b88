"""Kept and rebuilt graphs: the estimate is what a graph holds, the cap decides, and neither changes a product."""

import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from diag.curvature import matrices as curvature
from diag.curvature import memory as curvature_memory
from diag.curvature.matrices import GaussNewton, Hessian
from diag.curvature.memory import saved_bytes
from diag.errors import InvalidInput
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def wide(examples, width=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    return (
        model,
        nn.functional.cross_entropy,
        list(as_batches((torch.randn(examples, 4), torch.randint(3, (examples,))))),
    )


def graph_bytes(operator):
    objective = operator.objective
    with objective.measured():
        return saved_bytes(
            lambda part: operator._curvature().graph(part, part.parameters(), part.batches), objective
        )


def test_saved_bytes_of_a_forward_pass_are_those_of_its_activations():
    """tanh keeps its output and the second layer its input, which is the same tensor: n x width floats, once.
    Cross-entropy keeps the n x 3 log-probabilities and a scalar; parameters and data are not counted."""
    model, loss_fn, batches = wide(100)
    objective = Hessian(model, loss_fn, batches).objective
    with objective.measured():
        counted = saved_bytes(lambda part: part.loss(part.parameters(), part.batches[0]), objective)
    assert counted == pytest.approx(4 * (100 * 64 + 100 * 3), abs=64)


def test_what_was_counted_is_not_kept():
    """A graph that holds a tensor with its own history would keep itself alive."""
    model, loss_fn, batches = wide(100)
    objective, made = Hessian(model, loss_fn, batches).objective, []

    def loss(part):
        outputs = part.outputs(part.parameters(), part.batches[0]).exp()  # which saves its output
        made.append(weakref.ref(outputs))
        return part.loss_of(outputs, part.batches[0])

    with objective.measured():
        saved_bytes(loss, objective)
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_the_estimate_from_a_few_examples_is_what_the_whole_graph_saves(kind):
    model, loss_fn, batches = wide(1000)
    operator = kind(model, loss_fn, batches)
    whole = graph_bytes(operator)
    vectors = curvature_memory.WORKING_VECTORS * 4 * operator.size
    share = 1 + curvature_memory.KEPT_WORKING_SHARE
    assert operator.memory_plan.graph_bytes == pytest.approx(share * whole + vectors, rel=0.02)


def test_the_cap_decides_and_is_kept():
    model, loss_fn, batches = wide(1000)
    free = Hessian(model, loss_fn, batches)
    needed = free.memory_plan.graph_bytes
    v = cases.directions(free.size)[0]
    truth = free @ v
    assert free._graph is not None and free.memory_plan.retained
    for share in (0.9, 0.3, 0.05):
        capped = Hessian(model, loss_fn, batches, memory=int(share * needed))
        plan = capped.memory_plan
        assert not plan.retained and plan.allowed_bytes == int(share * needed)
        assert sum(b.size for b in plan.batches) == 1000
        for batch in plan.batches:
            part = Hessian(model, loss_fn, [batch], checked=free.self_test)
            assert graph_bytes(part) <= plan.allowed_bytes
        assert cases.relative(capped @ v, truth) < 2e-6  # float32 sums in another order
        assert capped._graph is None
    assert len(plan.batches) > 10


def test_a_cap_below_one_example_says_what_is_needed():
    model, loss_fn, batches = wide(100)
    operator = Hessian(model, loss_fn, batches, memory=1000)
    with pytest.raises(
        InvalidInput, match=r"one example needs about .* KiB and memory= allows 1000 bytes; allow at least"
    ):
        operator @ torch.zeros(operator.size)


def test_without_a_cap_rebuilt_graphs_keep_to_one_gradient(monkeypatch):
    model, loss_fn, batches = wide(1000)
    monkeypatch.setattr(curvature_memory, "available_memory", lambda device: 200_000)
    operator = Hessian(model, loss_fn, batches)
    objective = operator.objective
    with objective.measured():
        one_gradient = saved_bytes(lambda part: part.loss(part.parameters(), part.batches[0]), objective)
    plan = operator.memory_plan
    assert not plan.retained and len(plan.batches) > 1
    assert all(
        graph_bytes(Hessian(model, loss_fn, [b], checked=operator.self_test)) <= one_gradient for b in plan.batches
    )


def test_a_kept_graph_goes_when_released_and_comes_back():
    model, loss_fn, batches = cases.build(cases.mlp)
    operator = Hessian(model, loss_fn, batches)
    v = cases.directions(operator.size)[0]
    first = operator @ v
    kept = weakref.ref(operator._graph)
    operator.release()
    assert kept() is None
    assert torch.equal(operator @ v, first)


def test_a_graph_that_does_not_fit_after_all_is_rebuilt(monkeypatch):
    model, loss_fn, batches = cases.build(cases.mlp)
    truth = Hessian(model, loss_fn, batches).to_dense()
    operator = Hessian(model, loss_fn, batches)
    operator.memory_plan  # noqa: B018
    build = curvature.HessianOfLoss.graph

    def exhausted(self, objective, parameters, parts):
        if len(parts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(self, objective, parameters, parts)

    monkeypatch.setattr(curvature.HessianOfLoss, "graph", exhausted)
    assert cases.relative(operator.to_dense(), truth) < 2e-6
    assert not operator.memory_plan.retained


class Slopes(nn.Module):
    """Returns the derivative of a small network in its input, by torch.func, as physics-informed networks do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 1))

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda row: self.inner(row)[0]))(x)


def test_torch_func_inside_the_model_keeps_no_graph_and_gives_the_same_products():
    """grad refuses the hooks that count what is saved. The reference writes the derivative out."""
    torch.manual_seed(0)
    model = Slopes().double()
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    operator = Hessian(model, nn.functional.mse_loss, list(as_batches((x, y))))
    dense = operator.to_dense()
    assert not operator.memory_plan.retained

    def loss(flat):
        w, b, v, _ = (p.view(q.shape) for p, q in zip(flat.split([8, 4, 4, 1]), model.parameters(), strict=True))
        z = x @ w.T + b
        density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
        slope = torch.special.ndtr(z) + z * density  # the derivative of x ndtr(x)
        return nn.functional.mse_loss((slope * v) @ w, y)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    truth = torch.autograd.functional.hessian(loss, flat)
    assert cases.relative(dense, truth) < 1e-10
