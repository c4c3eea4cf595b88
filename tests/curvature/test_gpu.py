"""Curvature products on a CUDA device against float64 on the CPU; skipped where there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from diag.curvature.matrices import Fisher, GaussNewton, Hessian
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.__name__)
def test_products_are_those_of_the_cpu(case):
    model, loss_fn, batches = cases.build(case)
    reference = cases.Reference(model, loss_fn, batches)
    v = cases.directions(sum(p.numel() for p in model.parameters()))[0]
    model.cuda()  # the batches stay on the CPU: the operator brings them over
    on_device = v.cuda()
    assert cases.relative((Hessian(model, loss_fn, batches) @ on_device).cpu(), reference.product(v)) < 1e-5
    truth = reference.gauss_newton() @ v.double()
    for kind in (GaussNewton, Fisher):
        assert cases.relative((kind(model, loss_fn, batches) @ on_device).cpu(), truth) < 1e-5


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_product_over_a_kept_graph_does_not_wait_for_the_device(kind):
    model, loss_fn, batches = cases.build(cases.tied_gpt)
    operator = kind(model.cuda(), loss_fn, batches)
    v = cases.directions(operator.size)[0].cuda()
    operator @ v
    assert operator.memory_plan.retained
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator @ v
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_is_off_and_stays_as_it_was():
    torch.manual_seed(0)
    model = nn.Linear(256, 10).cuda()
    x, y = torch.randn(64, 256), torch.arange(64) % 10
    batches = list(as_batches((x, y)))
    reference = cases.Reference(model.cpu(), nn.functional.cross_entropy, batches)
    operator = Hessian(model.cuda(), nn.functional.cross_entropy, batches)
    v = cases.directions(operator.size)[0]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert cases.relative((operator @ v.cuda()).cpu(), reference.product(v)) < 1e-5
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
