"""Measuring curvature leaves no trace: not in the model, its gradients, random states or global settings."""

import contextlib
import copy
import importlib.util
import random
import threading
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from diag.curvature.matrices import Fisher, GaussNewton, Hessian
from diag.snapshot.reading.forms import as_batches

_spec = importlib.util.spec_from_file_location("curvature_cases", Path(__file__).with_name("curvature_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 4)
    )


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 1, 6, 6, generator=generator), torch.randint(4, (24,), generator=generator)


def trained(measure):
    """Final weights after two steps, the second with an optimizer that holds something, and with everything that
    measuring could disturb."""
    model, (x, y) = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    random.seed(0)
    numpy.random.seed(0)
    for _ in range(2):
        rows = torch.randint(24, (12,)) + random.randint(0, 0) + numpy.random.randint(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        measure(model, x, y)  # while the training step's own graph is pending
        loss.backward()
        measure(model, x, y)  # while there are gradients
        optimizer.step()
    return (
        model.state_dict(),
        [p.grad.clone() for p in model.parameters()],
        torch.rand(3),
        random.random(),
        numpy.random.rand(),
    )


def measure_all(model, x, y):
    batches = list(as_batches([(x[:16], y[:16]), (x[16:], y[16:])]))
    for kind in (Hessian, GaussNewton, Fisher):
        for settings in ({}, {"memory": 200_000}, {"precision": "float64"}):
            operator = kind(model, F.cross_entropy, batches, **settings)
            operator @ torch.ones(operator.size, dtype=operator.dtype)


@pytest.mark.parametrize("measure", [measure_all], ids=["all operators"])
def test_training_is_bit_identical(measure):
    plain, watched = trained(lambda *_: None), trained(measure)
    assert all(torch.equal(plain[0][key], watched[0][key]) for key in plain[0])
    assert all(map(torch.equal, plain[1], watched[1]))
    assert torch.equal(plain[2], watched[2]) and plain[3:] == watched[3:]


class Failing(nn.Module):
    """Fails at the call with this number. Unlike the state of a network, a semaphore's count is not put back."""

    def __init__(self, at):
        super().__init__()
        self.net, self.count, self.at, self.last = network(), threading.Semaphore(0), at, None

    @property
    def calls(self):
        return self.count._value

    def forward(self, x):
        self.count.release()
        self.last = self.net(x)
        if self.calls == self.at:
            raise KeyError("the model's own mistake")
        return self.last


def settings_in_force():
    return (
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.utils.checkpoint.CheckpointFunction,
        torch.utils.checkpoint._checkpoint_without_reentrant_generator,
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.overrides._get_current_function_mode(),
        torch.get_rng_state().tolist(),
        random.getstate(),
    )


def test_no_trace_whenever_the_model_fails():
    x, y = data()
    batches = list(as_batches((x, y)))
    calls = Failing(at=10**9)
    operator = Hessian(calls, F.cross_entropy, batches, memory=10**6)
    operator @ torch.ones(operator.size)
    assert calls.calls > 15
    for at in range(1, calls.calls + 1, 3):
        model = Failing(at).train()
        model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
        model.net[1].eval()  # a mode of its own
        before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], settings_in_force()
        operator = Hessian(model, F.cross_entropy, batches, memory=10**6)
        with contextlib.suppress(Exception):
            operator @ torch.ones(operator.size)
        assert model.calls >= at
        state = model.state_dict()
        assert all(torch.equal(before[0][key], state[key]) for key in state)
        assert before[1] == [m.training for m in model.modules()]
        assert before[2] == settings_in_force()
        assert torch.equal(model.net[0].weight.grad, torch.ones_like(model.net[0].weight))
        assert all(p.grad is None for p in list(model.parameters())[1:]) and model.last is None


def test_the_parameters_own_hooks_do_not_run():
    model, (x, y) = network(), data()
    ran = []
    model[0].weight.register_hook(lambda grad: ran.append(1) or grad * 0)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: ran.append(1))
    batches = list(as_batches((x, y)))
    hooked = Hessian(model, F.cross_entropy, batches).to_dense()
    assert not ran
    assert torch.equal(hooked, Hessian(network(), F.cross_entropy, batches).to_dense())


def test_the_vector_is_neither_changed_nor_returned():
    model, loss_fn, batches = cases.build(cases.mlp)
    for kind in (Hessian, GaussNewton):
        operator = kind(model, loss_fn, batches)
        v = cases.directions(operator.size)[0]
        before = v.clone()
        product = operator @ v
        assert torch.equal(v, before) and product.data_ptr() != v.data_ptr() and not product.requires_grad


def test_kernels_without_a_second_derivative_are_off_while_measuring_and_on_again():
    def forward(self, x):
        assert not torch.backends.mha.get_fastpath_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        return self.head(x.tanh())

    model = cases.Composed(forward, head=nn.Linear(4, 3))
    operator = Hessian(model, F.cross_entropy, cases.ragged(torch.randn(9, 4), torch.arange(9) % 3))
    operator @ torch.ones(operator.size)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()
